"""Charts of the experiments: of an A/B its visits and pairs, of a tuning its settings."""
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, StrMethodFormatter

from workbook import plots

FAR_ROOF = 1.5
"""A roof so many times above the nearest one would squeeze all that was measured into a corner of its picture."""


class _Whole(LogFormatter):
    """The places between powers of ten, written as those are: 60,000 and not 6e+04."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return super().__call__(x, pos) and f"{x:,g}"


def visits_in_order(name: str, unit: str, direction: str, visits: list[tuple[str, list[float]]]) -> Figure:
    """A metric's samples in the order in which an A/B took them.

    Args:
        visits: (variant, samples) of each visit.
    """
    figure, axes = plots.blank(7.2, 2.8)
    for side, colour, marker in (("a", "C0", "o"), ("b", "C1", "D")):
        points = [(x + 1, value) for x, (variant, values) in enumerate(visits) if variant == side for value in values]
        if points:
            axes.scatter(*zip(*points, strict=True), color=colour, marker=marker, s=26, label=side.upper())
    axes.set_xticks(range(1, len(visits) + 1))
    axes.set_xlabel("visit")
    axes.set_ylabel(unit)
    axes.set_title(f"{name} in the order taken ({plots.counted(sum(len(v) for _, v in visits), 'repetition')}; {direction} is better)", fontsize=10)
    axes.legend(loc="best", frameon=False, fontsize=8)
    return figure


def differences_by_pair(name: str, losses: list[float], low: float, high: float, margin: float, confidence: float) -> Figure:
    """How much slower B was in each pair of an A/B, their mean and its interval, and the line beyond which it fails.

    Args:
        losses: fraction of A's speed that B lacked, a pair each; negative where B was faster.
        low, high: interval of the mean, as fractions, with `confidence`.
    """
    figure, axes = plots.blank(7.2, 2.8)
    axes.axhspan(100 * low, 100 * high, color="C1", alpha=0.15, label=f"{confidence * 100:.0f} % interval of the mean")
    axes.axhline(0, color="0.4", lw=1)
    axes.axhline(100 * margin, color="C3", lw=1, ls="--", label=f"{margin * 100:.0f} % slower")
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
    figure, axes = plots.blank(10.0, 5.6)
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
        axes.annotate(f"{point:,} in flight", (slowest.latency, slowest.speed), xytext=(0, -9), textcoords="offset points", ha="center", va="top", fontsize=8, color="0.35")
    nearest = min((max(y for _, y in places) for places in roofs.values()), default=0)
    for (roof, places), style in zip(roofs.items(), ("--", "-.")):
        above, seen = max(y for _, y in places) / points.speed.max(), max(y for _, y in places) <= FAR_ROOF * nearest
        axes.plot(*(zip(*places, strict=True) if seen else ([], [])), color="0.25", ls=style, lw=1.4, marker=".", zorder=2,
                  label=f"{roof} roof, {above:,.1f} × the fastest{'' if seen else ' (off the picture)'}")
    for axis in (axes.xaxis, axes.yaxis):
        getattr(axes, f"set_{axis.axis_name}scale")("log")
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_formatter(_Whole(minor_thresholds=(1.5, 0.5)))
    axes.margins(0.14, 0.1)
    axes.set_xlabel("output tok/s of a request, median (to the right: faster for each)")
    axes.set_ylabel("output tok/s of all requests (up: faster for all)")
    axes.set_title(f"Throughput against latency ({plots.counted(points.setting.nunique(), 'setting')}, medians over repetitions; up and to the right is better)", fontsize=10)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, labelspacing=0.7, handlelength=3.2)
    return figure


def ratios(name: str, rows: list[tuple[str, float, float, float]], margin: float, confidence: float) -> Figure:
    """Settings held against the untuned one, the fastest on top, with their intervals.

    Args:
        rows: (setting, ratio, low, high) of each.
        margin: the difference up to which none is called one, as a fraction.
    """
    figure, axes = plots.blank(7.2, 1.1 + 0.3 * len(rows))
    axes.axvspan(1 - margin, 1 + margin, color="0.9", zorder=0, label=f"no difference: within {margin * 100:.0f} %")
    axes.axvline(1, color="black", lw=1)
    for y, (_, ratio, low, high) in enumerate(sorted(rows, key=lambda row: row[1])):
        colour, marker = ("C0", "^") if low > 1 + margin else ("C1", "v") if high < 1 - margin else ("0.5", "o")
        axes.hlines(y, low, high, color=colour, lw=2)
        axes.plot(ratio, y, color=colour, marker=marker, ms=7)
        axes.annotate(f"{ratio:.2f}", (1.0, y), xycoords=("axes fraction", "data"), ha="left", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row[0] for row in sorted(rows, key=lambda row: row[1])])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"{name} as a multiple of the untuned run's, with its {100 * confidence:.3g} % interval (higher is better)", fontsize=9)
    axes.set_title(f"{name}: each setting against the untuned run ({plots.counted(len(rows), 'setting')})", fontsize=10)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    return figure
