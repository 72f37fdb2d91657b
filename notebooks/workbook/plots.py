"""Charts: one make for all notebooks, with a text for those who cannot see them."""
import base64
import html
import io
import math
from itertools import cycle

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from workbook.metrics import THROUGHPUT, headline, kind

MOST_LINES = 400
"""Requests that a chart draws one by one: more than its height in pixels would only cover each other."""
MOST_DATES = 6
"""Dates that fit side by side on an axis."""

matplotlib.style.use("petroff10")


def show(figure: Figure, alt: str) -> None:
    """Display a figure as an inline picture with an alternative text."""
    from IPython.display import HTML, display
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    image = base64.b64encode(stream.getvalue()).decode()
    display(HTML(f'<img style="max-width: 100%" alt="{html.escape(alt)}" src="data:image/png;base64,{image}">'))


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, inches wide and high, on which a chart is drawn."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))  # 124,000 and not 124000; what is no number of this kind sets its own
    return figure, axes


def counted(number: int, what: str) -> str:
    """What a chart shows, for its title: `n = 1 run`, `n = 1,024 runs`."""
    return f"n = {number:,} {what}{'' if number == 1 else 's'}"


def samples_against_golden(name: str, unit: str, direction: str, sessions: list[list[float]],
                           golden: list[list[float]] | None, margin: float | None) -> Figure:
    """A metric's samples by session beside its golden's, with the golden mean and the band in which no loss is called one.

    Args:
        sessions, golden: a list of samples for each session.
        margin: the gate's, as a fraction, or None for no band.
    """
    figure, axes = blank(7.2, 3.0)
    groups = [(f"golden {i + 1}", s, "C0", "o") for i, s in enumerate(golden or [])]
    groups += [(f"new {i + 1}", s, "C1", "D") for i, s in enumerate(sessions)]
    for x, (_, values, colour, marker) in enumerate(groups):
        spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else [0]
        axes.scatter(x + np.asarray(spread), values, color=colour, marker=marker, s=36, zorder=3)
        axes.hlines(np.mean(values), x - 0.3, x + 0.3, color=colour, lw=2, label="mean of a session" if x == len(groups) - 1 else None)
    if golden:
        mean = float(np.exp(np.mean([np.mean(np.log(s)) for s in golden])))
        axes.axhline(mean, color="C0", lw=1, ls="--", label="golden mean")
        if margin is not None:
            limit = mean * (1 - margin) if direction == "higher" else mean / (1 - margin)  # of the speed
            axes.axhspan(min(mean, limit), max(mean, limit), color="C0", alpha=0.12, label=f"margin, {margin * 100:.0f} %: no loss is called here")
    axes.legend(loc="best", frameon=False, fontsize=8)
    axes.set_xticks(range(len(groups)), [g[0] for g in groups])
    axes.set_ylabel(unit)
    axes.set_title(f"{name} by session ({counted(sum(len(g[1]) for g in groups), 'repetition')}; {direction} is better)", fontsize=10)
    return figure


def request_timeline(requests: pd.DataFrame) -> Figure:
    """One repetition: each request from its arrival over its first to its last token; of more than `MOST_LINES` an
    even choice."""
    figure, axes = blank(7.2, 3.0)
    rows = requests.sort_values("first_token_s").reset_index(drop=True)
    if len(rows) > MOST_LINES:
        rows = rows.iloc[np.linspace(0, len(rows) - 1, MOST_LINES).round().astype(int)]
    axes.hlines(rows.index, rows.arrival_s, rows.first_token_s, color="0.8", lw=1, label="waiting for the first token")
    axes.hlines(rows.index, rows.first_token_s, rows.last_token_s, color="C0", lw=1, label="generating")
    axes.set_xlabel("seconds since the repetition began")
    axes.set_ylabel("request")
    shown = "" if len(rows) == len(requests) else f", {len(rows)} of them shown"
    axes.set_title(f"Requests of one repetition (n = {len(requests):,}{shown})", fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
    return figure


def cdf(name: str, unit: str, new: list[np.ndarray], golden: list[list[float]]) -> Figure:
    """Share of requests up to each value, a line a session.

    Args:
        new: values of the requests of each session.
        golden: evenly spaced quantiles of each of the golden's sessions; empty if it has none.
    """
    figure, axes = blank(7.2, 2.6)
    for number, values in enumerate(golden, start=1):
        axes.plot(values, np.linspace(0, 100, len(values)), color="C0", lw=1, marker="o", ms=3, label="golden, each session" if number == 1 else None)
    for number, values in enumerate(new, start=1):
        axes.step(np.sort(values), np.arange(1, len(values) + 1) / len(values) * 100, where="post", color="C1", lw=1.5, ls=("-", "--")[number > 1], label=f"new {number}")
    axes.set_xlabel(f"{name}, {unit}")
    axes.set_ylabel("requests up to this, %")
    axes.set_title(f"{name} of requests ({counted(sum(map(len, new)), 'new one')})", fontsize=10)
    axes.legend(loc="best", frameon=False, fontsize=8)
    return figure


def telemetry(frame: pd.DataFrame, windows: list[tuple[float, float]]) -> Figure:
    """Busy % of the CPU and GPUs over the session and, below, the GPUs' power and clock; the measured windows shaded."""
    panels = [(suffix, label) for suffix, label in (("busy_pct", "busy, %"), ("power_w", "power, W"), ("sm_mhz", "SM clock, MHz"))
              if any(c.endswith(suffix) for c in frame)]
    figure = Figure(figsize=(7.2, 0.8 + 1.6 * len(panels)), layout="constrained")
    start = frame.time.min()
    measured = dict.fromkeys(c.removesuffix(f"_{suffix}") for suffix, _ in panels for c in frame if c.endswith(f"_{suffix}"))
    look = {what: place for place, what in enumerate(measured)}  # one colour for a GPU in all panels
    for axes, (suffix, label) in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels):
        axes.spines[["top", "right"]].set_visible(False)
        for what in (c.removesuffix(f"_{suffix}") for c in frame if c.endswith(suffix)):
            axes.plot(frame.time - start, frame[f"{what}_{suffix}"], color=f"C{look[what]}", marker="os^Dv<>ph"[look[what] % 9], ms=3, lw=1, markevery=0.1, label=what.upper())
        for begin, end in windows:
            axes.axvspan(begin - start, end - start, color="0.92", zorder=0)
        highest = frame.filter(like=suffix).max(axis=None)
        axes.set_ylim(0, 103 if suffix == "busy_pct" else 1.05 * highest if highest > 0 else None)
        axes.set_ylabel(label)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)  # inside it would cover what was measured
    axes.set_xlabel("seconds (measured repetitions shaded)" if windows else "seconds")
    figure.suptitle("The machine while the load ran", fontsize=10)
    return figure


def sweep(metrics: dict[str, dict]) -> Figure:
    """Output tok/s over the points of a sweep, every repetition, beside the golden's.

    Args:
        metrics: the table of `results.metric_table`.
    """
    figure, axes = blank(7.2, 3.0)
    rows = sorted((int(name.partition("@")[2]), row) for name, row in metrics.items() if name.startswith(f"{THROUGHPUT}@"))
    sizes = [size for size, _ in rows]
    for key, label, colour, marker in (("golden_sessions", "golden", "C0", "o"), ("sessions", "this run", "C1", "D")):
        samples = [np.concatenate(row[key]) if row[key] else np.array([]) for _, row in rows]
        if all(len(s) for s in samples):
            axes.plot(sizes, [np.median(s) for s in samples], color=colour, marker=marker, ms=5, label=f"{label}, median")
            axes.scatter(np.repeat(sizes, [len(s) for s in samples]), np.concatenate(samples), color=colour, marker=marker, s=12, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))  # 40,000 and not 4 x 10^4
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("requests at a time, log scale")
    axes.set_ylabel("output tok/s, log scale")
    axes.set_title(f"Throughput by requests at a time ({counted(sum(len(s) for s in rows[0][1]['sessions']), 'repetition')}; higher is better)", fontsize=10)
    axes.legend(loc="best", frameon=False, fontsize=8)
    return figure


def scaling(curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """Speed-up over one GPU by the number of GPUs, a line for each way of spreading an exam, below the line of all that they could give.

    Args:
        curves: as `scaling.curves`.
    """
    figure, axes = blank(7.2, 3.6)
    counts = sorted({gpus for line in curves.values() for gpus, _ in line})
    axes.plot(counts, counts, color="0.6", lw=1, ls="--", label="ideal")
    for (what, line), marker in zip(curves.items(), cycle("oDsv^"), strict=False):
        (drawn,) = axes.plot(*zip(*line, strict=True), marker=marker, ms=6, label=what)
        for gpus, times in line[1:]:
            axes.annotate(f"{times:.2f} × ({times / gpus * 100:.0f} %)", (gpus, times), xytext=(7, -10), textcoords="offset points", fontsize=8, color=drawn.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.margins(x=0.12)  # room for the last label
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_yticks(counts, [f"{count} ×" for count in counts])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("of one GPU's output tok/s")
    axes.set_title(f"Scaling ({counted(sum(len(line) - 1 for line in curves.values()), 'run')}; higher is better)", fontsize=10)
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    return figure


def pass_at_k(new: list[float], golden: list[float] | None) -> Figure:
    """Share of questions of which k samples hold a right one, k from 1 to n."""
    figure, axes = blank(4.8, 2.6)
    for values, label, colour, marker in ((golden, "golden", "C0", "o"), (new, "this run", "C1", "D")):
        if values:
            axes.plot(range(1, len(values) + 1), 100 * np.asarray(values), color=colour, marker=marker, ms=5, label=label)
    axes.set_xticks(range(1, len(new) + 1) if len(new) <= 16 else axes.get_xticks())
    axes.set_xlim(0.8, len(new) + 0.2)
    axes.set_ylim(0, 103)
    axes.set_xlabel("k samples")
    axes.set_ylabel("questions solved, %")
    axes.set_title(f"pass@k (n = {len(new)} samples a question; higher is better)", fontsize=10)
    axes.legend(loc="best", frameon=False, fontsize=8)
    return figure


def answer_lengths(new: np.ndarray, golden: np.ndarray | None) -> Figure:
    """Histogram of the answers' output tokens, beside the golden's."""
    figure, axes = blank(7.2, 2.6)
    both = [(values, label, colour) for values, label, colour in ((golden, "golden", "C0"), (new, "this run", "C1")) if values is not None]
    largest = max(int(values.max()) for values, _, _ in both)
    step = max(1, -(-largest // 40))
    edges = np.arange(0, largest + step + 1, step)  # the last one is beyond the longest: answers cut off are a spike there
    for values, label, colour in both:
        share = np.full(values.size, 100 / values.size)
        axes.hist(values.ravel(), bins=edges, weights=share, histtype="step", lw=1.5, color=colour, ls="--" if label == "golden" else "-", label=f"{label}, mean {values.mean():.1f}")
    axes.set_xlabel("output tokens")
    axes.set_ylabel("answers, %")
    axes.set_title(f"Length of the answers (n = {new.size:,})", fontsize=10)
    axes.legend(loc="best", frameon=False, fontsize=8)
    return figure


def golden_history(run: str, name: str, unit: str, points: list[tuple[str, float]], now: float | None) -> Figure:
    """The mean of a metric in each golden of a run, in the order of their blessing, and its value in the present run.

    Args:
        points: (time in ISO 8601, mean) of each blessing.
    """
    figure, axes = blank(7.2, 2.6)
    axes.plot(range(len(points)), [value for _, value in points], color="C0", marker="o", ms=5, label="golden, mean")
    axes.axhline(points[0][1], color="C0", lw=1, ls="--", label="the first one")
    if now is not None:
        axes.plot([len(points)], [now], color="C1", marker="D", ls="", label="this run, median")
    days = [when[:10] for when, _ in points]
    labels = [f"{day}\n{when[11:16]}" if days.count(day) > 1 else day for day, (when, _) in zip(days, points)]
    step = math.ceil(len(points) / MOST_DATES)
    some = range(len(points) - step, -1, -step)  # from the end, where "now" wants its place
    axes.set_xticks([*some, len(points)], [*(labels[i] for i in some), "now"])
    axes.set_ylabel(f"{name}, {unit}")
    axes.set_title(f"Goldens of {run} (n = {len(points)} blessings; {kind(name).direction} is better)", fontsize=10)
    axes.legend(loc="best", frameon=False, fontsize=8)
    return figure


def throughput_overview(results: list[dict]) -> Figure | None:
    """Output tok/s of every run relative to its golden's median, with the band in which no loss is called one; None without any."""
    named = [(r, headline(r["metrics"])) for r in results]
    rows = [(r["run"], r["metrics"][name], r["gates"].get(name, {}).get("margin")) for r, name in named if name and r["metrics"][name]["sessions"]]
    if not rows:
        return None
    figure, axes = blank(8.4, 1.1 + 0.55 * len(rows))
    for y, (_, metric, margin) in enumerate(rows):
        values = np.concatenate(metric["sessions"])
        golden = metric["golden_median"]
        scale = 100 / (golden or float(np.median(values)))
        if golden:
            old = np.concatenate(metric["golden_sessions"]) * scale
            axes.scatter(old, np.full(len(old), y + 0.12), color="C0", marker="o", s=18, label="golden")
        if golden and margin:
            axes.fill_betweenx([y - 0.35, y + 0.35], 100 * (1 - margin), 100, color="C0", alpha=0.12)
        axes.scatter(values * scale, np.full(len(values), y - 0.12), color="C1" if golden else "0.5", marker="D", s=26, zorder=3,
                     label="this run" if golden else "this run, no golden")
        axes.annotate(f"{np.median(values):,.0f} tok/s" + ("" if golden else " (no golden)"), (1.0, y), xycoords=("axes fraction", "data"),
                      ha="left", va="center", fontsize=9)
    axes.axvline(100, color="C0", lw=1, ls="--")
    held = [margin for _, metric, margin in rows if metric["golden_median"]]
    axes.set_yticks(range(len(rows)), [r[0] for r in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    against = "the golden's median or, without one, of its own" if held else "the run's own median"
    axes.set_xlabel(f"output tok/s of each repetition, % of {against} ({'band: margin, no loss is called there; ' if any(held) else ''}higher is better)", fontsize=9)
    axes.set_title(f"Throughput{' against golden' if held else ', no golden'} ({counted(len(rows), 'run')})", fontsize=10, loc="left", pad=20)
    handles, labels = axes.get_legend_handles_labels()
    each = dict(zip(labels, handles, strict=True))
    axes.legend(each.values(), each.keys(), loc="lower left", bbox_to_anchor=(-0.02, 0.97), ncol=len(each), fontsize=8, frameon=False, handletextpad=0.1, columnspacing=1.0)
    return figure
