"""Charts: one make for all notebooks, with a text for those who cannot see them."""
import base64
import html
import io
from itertools import cycle

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogLocator, NullLocator, StrMethodFormatter

from workbook.metrics import THROUGHPUT, headline, kind

MOST_LINES = 400
"""Requests that a chart draws one by one: more than its height in pixels would only cover each other."""
FAR_ROOF = 5
"""A roof so many times above the nearest one would squeeze all that was measured into a corner of its picture."""

matplotlib.style.use("petroff10")


def show(figure: Figure, alt: str) -> None:
    """Display a figure as an inline picture with an alternative text."""
    from IPython.display import HTML, display
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    image = base64.b64encode(stream.getvalue()).decode()
    display(HTML(f'<img style="max-width: 100%" alt="{html.escape(alt)}" src="data:image/png;base64,{image}">'))


def _axes(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))  # 124,000 and not 124000; what is no number of this kind sets its own
    return figure, axes


def samples_against_golden(name: str, unit: str, direction: str, sessions: list[list[float]],
                           golden: list[list[float]] | None, delta: float | None) -> Figure:
    """A metric's samples by session beside its golden's, with the golden mean and its tolerance band.

    Args:
        sessions, golden: a list of samples for each session.
        delta: tolerated loss as a fraction, or None for no band.
    """
    figure, axes = _axes(7.2, 3.0)
    groups = [(f"golden {i + 1}", s, "C0", "o") for i, s in enumerate(golden or [])]
    groups += [(f"new {i + 1}", s, "C1", "D") for i, s in enumerate(sessions)]
    for x, (_, values, colour, marker) in enumerate(groups):
        spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else [0]
        axes.scatter(x + np.asarray(spread), values, color=colour, marker=marker, s=36, zorder=3)
        axes.hlines(np.mean(values), x - 0.3, x + 0.3, color=colour, lw=2)
    if golden:
        mean = float(np.exp(np.mean([np.mean(np.log(s)) for s in golden])))
        axes.axhline(mean, color="C0", lw=1, ls="--", label="golden mean")
        if delta is not None:
            limit = mean * (1 - delta) if direction == "higher" else mean / (1 - delta)  # of the speed
            axes.axhspan(min(mean, limit), max(mean, limit), color="C0", alpha=0.12, label=f"tolerated loss, {delta:.0%}")
        axes.legend(loc="best", frameon=False, fontsize=8)
    axes.set_xticks(range(len(groups)), [g[0] for g in groups])
    axes.set_ylabel(unit)
    axes.set_title(f"{name} by session (n = {sum(len(g[1]) for g in groups)} repetitions; {direction} is better)", fontsize=10)
    return figure


def visits_in_order(name: str, unit: str, direction: str, visits: list[tuple[str, list[float]]]) -> Figure:
    """A metric's samples in the order in which an A/B took them.

    Args:
        visits: (variant, samples) of each visit.
    """
    figure, axes = _axes(7.2, 2.8)
    for side, colour, marker in (("a", "C0", "o"), ("b", "C1", "D")):
        points = [(x + 1, value) for x, (variant, values) in enumerate(visits) if variant == side for value in values]
        if points:
            axes.scatter(*zip(*points, strict=True), color=colour, marker=marker, s=26, label=side.upper())
    axes.set_xticks(range(1, len(visits) + 1))
    axes.set_xlabel("visit")
    axes.set_ylabel(unit)
    axes.set_title(f"{name} in the order taken (n = {sum(len(v) for _, v in visits)} repetitions; {direction} is better)", fontsize=10)
    axes.legend(loc="best", frameon=False, fontsize=8)
    return figure


def differences_by_pair(name: str, losses: list[float], low: float, high: float, margin: float, confidence: float) -> Figure:
    """How much slower B was in each pair of an A/B, their mean and its interval, and the line beyond which it fails.

    Args:
        losses: fraction of A's speed that B lacked, a pair each; negative where B was faster.
        low, high: interval of the mean, as fractions, with `confidence`.
    """
    figure, axes = _axes(7.2, 2.8)
    axes.axhspan(100 * low, 100 * high, color="C1", alpha=0.15, label=f"{confidence:.0%} interval of the mean")
    axes.axhline(0, color="0.4", lw=1)
    axes.axhline(100 * margin, color="C3", lw=1, ls="--", label=f"{margin:.0%} slower")
    axes.scatter(range(1, len(losses) + 1), 100 * np.asarray(losses), color="C1", marker="D", s=30, zorder=3, label="a pair")
    axes.set_xticks(range(1, len(losses) + 1))
    axes.set_xlabel("pair")
    axes.set_ylabel("B slower than A, %")
    axes.set_title(f"{name}: B against A in each pair (n = {len(losses)} pairs; lower is better for B)", fontsize=10)
    axes.legend(loc="best", frameon=False, fontsize=8)
    return figure


def throughput_against_latency(points: pd.DataFrame, roofs: dict[str, list[tuple[float, float]]], front: list[tuple[str, int]], best: str) -> Figure:
    """What all requests get together against what each of them gets: a line a setting through the points of its sweep,
    the Pareto front behind them, and the nearest roof above. A roof that is far above it is off the picture; the legend
    says by how much each is above the fastest.

    Args:
        points: as `tuning.point_table`; the first setting is the untuned one.
        roofs, front: as `tuning.roofs` and `tuning.pareto`.
        best: the setting that is drawn thicker.
    """
    figure, axes = _axes(10.0, 5.6)
    where = {(row.setting, row.point): (row.latency, row.speed) for row in points.itertuples()}
    axes.plot(*zip(*(where[place] for place in front), strict=True), color="0.87", lw=10, marker="o", ms=10, solid_capstyle="round", zorder=1, label="Pareto front")
    colours, markers = cycle([f"C{i}" for i in range(10)]), cycle("sDv^<>pPXhd")
    for number, (setting, rows) in enumerate(points.groupby("setting", sort=False)):
        thick = setting == best
        # There are more settings than colours: the two that matter have one of their own.
        colour, marker = ("black", "o") if number == 0 else ("crimson", "*") if thick else (next(colours), next(markers))
        axes.plot(rows.latency, rows.speed, color=colour, marker=marker, ms=11 if thick else 5, lw=2.2 if thick else 1, zorder=4 if thick else 3, label=setting + " (best)" * thick)
    for point, rows in points[points.point > 0].groupby("point"):
        slowest = rows.loc[rows.latency.idxmin()]
        axes.annotate(f"{point:,} in flight", (slowest.latency, slowest.speed), xytext=(-8, 0), textcoords="offset points", ha="right", va="center", fontsize=8, color="0.35")
    nearest = min((max(y for _, y in places) for places in roofs.values()), default=0)
    for (roof, places), style in zip(roofs.items(), ("--", "-.")):
        above, seen = max(y for _, y in places) / points.speed.max(), max(y for _, y in places) <= FAR_ROOF * nearest
        axes.plot(*(zip(*places, strict=True) if seen else ([], [])), color="0.25", ls=style, lw=1.4, marker=".", zorder=2,
                  label=f"{roof} roof, {above:,.1f} × the fastest{'' if seen else ' (off the picture)'}")
    for axis in (axes.xaxis, axes.yaxis):
        getattr(axes, f"set_{axis.axis_name}scale")("log")
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.margins(0.14, 0.1)
    axes.set_xlabel("output tok/s of a request, median (to the right: faster for each)")
    axes.set_ylabel("output tok/s of all requests (up: faster for all)")
    axes.set_title(f"Throughput against latency (n = {points.setting.nunique()} settings, medians over repetitions; up and to the right is better)", fontsize=10)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, labelspacing=0.7, handlelength=3.2)
    return figure


def ratios(name: str, rows: list[tuple[str, float, float, float]], margin: float, confidence: float) -> Figure:
    """Settings held against the untuned one, the fastest on top, with their intervals.

    Args:
        rows: (setting, ratio, low, high) of each.
        margin: the difference up to which none is called one, as a fraction.
    """
    figure, axes = _axes(7.2, 1.1 + 0.3 * len(rows))
    axes.axvspan(1 - margin, 1 + margin, color="0.9", zorder=0, label=f"no difference: within {margin:.0%}")
    axes.axvline(1, color="black", lw=1)
    for y, (_, ratio, low, high) in enumerate(sorted(rows, key=lambda row: row[1])):
        colour, marker = ("C0", "^") if low > 1 + margin else ("C1", "v") if high < 1 - margin else ("0.5", "o")
        axes.hlines(y, low, high, color=colour, lw=2)
        axes.plot(ratio, y, color=colour, marker=marker, ms=7)
        axes.annotate(f"{ratio:.2f}", (1.0, y), xycoords=("axes fraction", "data"), ha="left", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row[0] for row in sorted(rows, key=lambda row: row[1])])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"{name} as a multiple of the untuned run's, with its {confidence:.0%} interval (higher is better)", fontsize=9)
    axes.set_title(f"{name}: each setting against the untuned run (n = {len(rows)} settings)", fontsize=10)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    return figure


def request_timeline(requests: pd.DataFrame) -> Figure:
    """One repetition: each request from its arrival over its first to its last token; of more than `MOST_LINES` an
    even choice."""
    figure, axes = _axes(7.2, 3.0)
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
    figure, axes = _axes(7.2, 2.6)
    for number, values in enumerate(golden, start=1):
        axes.plot(values, np.linspace(0, 100, len(values)), color="C0", lw=1, marker="o", ms=3, label="golden, each session" if number == 1 else None)
    for number, values in enumerate(new, start=1):
        axes.step(np.sort(values), np.arange(1, len(values) + 1) / len(values) * 100, where="post", color="C1", lw=1.5, ls=("-", "--")[number > 1], label=f"new {number}")
    axes.set_xlabel(f"{name}, {unit}")
    axes.set_ylabel("requests up to this, %")
    axes.set_title(f"{name} of requests (n = {sum(map(len, new)):,} new ones)", fontsize=10)
    axes.legend(loc="best", frameon=False, fontsize=8)
    return figure


def telemetry(frame: pd.DataFrame, windows: list[tuple[float, float]]) -> Figure:
    """Busy % of the CPU and GPUs over the session and, below, the GPUs' power and clock; the measured windows shaded."""
    panels = [(suffix, label) for suffix, label in (("busy_pct", "busy, %"), ("power_w", "power, W"), ("sm_mhz", "SM clock, MHz"))
              if any(c.endswith(suffix) for c in frame)]
    figure = Figure(figsize=(7.2, 0.8 + 1.6 * len(panels)), layout="constrained")
    start = frame.time.min()
    for axes, (suffix, label) in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels):
        axes.spines[["top", "right"]].set_visible(False)
        for column, marker in zip([c for c in frame if c.endswith(suffix)], cycle("os^Dv<>ph")):
            axes.plot(frame.time - start, frame[column], marker=marker, ms=3, lw=1, markevery=0.1, label=column.removesuffix(f"_{suffix}").upper())
        for begin, end in windows:
            axes.axvspan(begin - start, end - start, color="0.92", zorder=0)
        axes.set_ylim(0, 103 if suffix == "busy_pct" else None)
        axes.set_ylabel(label)
        axes.legend(loc="lower right", fontsize=8)
    axes.set_xlabel("seconds (measured repetitions shaded)" if windows else "seconds")
    figure.suptitle("The machine while the load ran", fontsize=10)
    return figure


def sweep(metrics: dict[str, dict]) -> Figure:
    """Output tok/s over the points of a sweep, every repetition, beside the golden's.

    Args:
        metrics: the table of `results.metric_table`.
    """
    figure, axes = _axes(7.2, 3.0)
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
    axes.set_xlabel("requests at a time")
    axes.set_ylabel("output tok/s")
    axes.set_title(f"Throughput by requests at a time (n = {sum(len(s) for s in rows[0][1]['sessions'])} repetitions; higher is better)", fontsize=10)
    axes.legend(loc="best", frameon=False, fontsize=8)
    return figure


def scaling(curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """Speed-up over one GPU by the number of GPUs, a line for each way of spreading an exam, below the line of all that they could give.

    Args:
        curves: as `scaling.curves`.
    """
    figure, axes = _axes(7.2, 3.6)
    counts = sorted({gpus for line in curves.values() for gpus, _ in line})
    axes.plot(counts, counts, color="0.6", lw=1, ls="--", label="ideal")
    for (what, line), marker in zip(curves.items(), cycle("oDsv^"), strict=False):
        (drawn,) = axes.plot(*zip(*line, strict=True), marker=marker, ms=6, label=what)
        for gpus, times in line[1:]:
            axes.annotate(f"{times:.2f} × ({times / gpus:.0%})", (gpus, times), xytext=(7, -10), textcoords="offset points", fontsize=8, color=drawn.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.margins(x=0.12)  # room for the last label
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_yticks(counts, [f"{count} ×" for count in counts])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("of one GPU's output tok/s")
    axes.set_title(f"Scaling (n = {sum(len(line) - 1 for line in curves.values())} runs; higher is better)", fontsize=10)
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    return figure


def pass_at_k(new: list[float], golden: list[float] | None) -> Figure:
    """Share of questions of which k samples hold a right one, k from 1 to n."""
    figure, axes = _axes(4.8, 2.6)
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
    figure, axes = _axes(7.2, 2.6)
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
    figure, axes = _axes(7.2, 2.6)
    axes.plot(range(len(points)), [value for _, value in points], color="C0", marker="o", ms=5, label="golden, mean")
    axes.axhline(points[0][1], color="C0", lw=1, ls="--", label="the first one")
    if now is not None:
        axes.plot([len(points)], [now], color="C1", marker="D", ls="", label="this run, median")
    axes.set_xticks(range(len(points) + 1), [when[:10] for when, _ in points] + ["now"])
    axes.set_ylabel(f"{name}, {unit}")
    axes.set_title(f"Goldens of {run} (n = {len(points)} blessings; {kind(name).direction} is better)", fontsize=10)
    axes.legend(loc="best", frameon=False, fontsize=8)
    return figure


def throughput_overview(results: list[dict]) -> Figure | None:
    """Output tok/s of every run relative to its golden's median, with the tolerated band; None without any."""
    named = [(r, headline(r["metrics"])) for r in results]
    rows = [(r["run"], r["metrics"][name], r["gates"].get(name, {}).get("delta")) for r, name in named if name and r["metrics"][name]["sessions"]]
    if not rows:
        return None
    figure, axes = _axes(8.4, 1.1 + 0.55 * len(rows))
    for y, (_, metric, delta) in enumerate(rows):
        values = np.concatenate(metric["sessions"])
        golden = metric["golden_median"]
        scale = 100 / (golden or float(np.median(values)))
        if golden:
            old = np.concatenate(metric["golden_sessions"]) * scale
            axes.scatter(old, np.full(len(old), y + 0.12), color="C0", marker="o", s=18, label="golden")
        if golden and delta:
            axes.fill_betweenx([y - 0.35, y + 0.35], 100 * (1 - delta), 100, color="C0", alpha=0.12)
        axes.scatter(values * scale, np.full(len(values), y - 0.12), color="C1" if golden else "0.5", marker="D", s=26, zorder=3,
                     label="this run" if golden else "this run, no golden")
        axes.annotate(f"{np.median(values):,.0f} tok/s" + ("" if golden else " (no golden)"), (1.0, y), xycoords=("axes fraction", "data"),
                      ha="left", va="center", fontsize=9)
    axes.axvline(100, color="C0", lw=1, ls="--")
    axes.set_yticks(range(len(rows)), [r[0] for r in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("output tok/s of each repetition, % of the golden's median or, without one, of its own (band: tolerated loss; higher is better)", fontsize=9)
    axes.set_title(f"Throughput against golden (n = {len(rows)} runs)", fontsize=10, loc="left", pad=20)
    handles, labels = axes.get_legend_handles_labels()
    each = dict(zip(labels, handles, strict=True))
    axes.legend(each.values(), each.keys(), loc="lower left", bbox_to_anchor=(-0.02, 0.97), ncol=len(each), fontsize=8, frameon=False, handletextpad=0.1, columnspacing=1.0)
    return figure
