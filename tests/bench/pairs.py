"""Passes in pairs, the workbook's and another's in turn, and the bar that their ratio has to clear.

A machine drifts (clocks, caches, neighbours), so what is compared are passes of a second or two right after one another:
a pair is made of rounds of the workbook's, the other's, the other's, the workbook's (ABBA: a linear drift cancels), every
second round the other way round.
"""
import contextlib
import math
import os
from collections.abc import Callable

import numpy as np
from scipy import stats

ROUNDS = 4
"""Of each pair: sixteen passes, eight of either side."""
MEDIAN, LOWER = 0.98, 0.95
"""The least that the median ratio and the lower end of its 90 % interval may be."""


def alternate(ours: Callable[[], float], other: Callable[[], float], pairs: int, names: tuple[str, str] = ("workbook", "vllm bench"),
              rounds: int = ROUNDS) -> list[float]:
    """Run both once to warm up, then `pairs` pairs of `rounds` rounds, with a row printed for each pair.

    Args:
        ours, other: run one pass and return its output tok/s.

    Returns:
        Ours / other of each pair, of the geometric means of their passes: above 1 the workbook is faster.
    """
    with silence():
        ours(), other()
    print(f"pair  {names[0]:>12}  {names[1]:>12}   ratio")
    ratios = []
    for pair in range(pairs):
        found = {ours: [], other: []}
        for number in range(rounds):
            for run in (ours, other, other, ours) if number % 2 == 0 else (other, ours, ours, other):
                with silence():
                    found[run].append(run())
        first, second = (math.exp(np.log(found[run]).mean()) for run in (ours, other))
        ratios.append(first / second)
        print(f"{pair + 1:4}  {first:12.1f}  {second:12.1f}   {first / second:.4f}", flush=True)
    return ratios


@contextlib.contextmanager
def silence():
    """No progress bars, of either side: they are drawn as always, and go nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def interval(ratios: list[float]) -> tuple[float, float]:
    """90 % interval of the mean ratio, by Student's t on the logarithms; needs two pairs or more."""
    logs = np.log(ratios)
    low, high = np.exp(stats.t.interval(0.90, len(logs) - 1, logs.mean(), stats.sem(logs)))
    return float(low), float(high)


def report(found: dict[str, list[float]]) -> int:
    """Print a line for each comparison, and last whether all clear the bar; returns the exit code, 0 if they do."""
    print()
    missed = []
    for what, ratios in found.items():
        median, low = float(np.median(ratios)), interval(ratios)[0]
        print(f"{what}: median ratio {median:.4f}, lower end of the 90 % interval {low:.4f} ({len(ratios)} pairs, {min(ratios):.3f} to {max(ratios):.3f})")
        if median < MEDIAN or low < LOWER:
            missed.append(what)
    print(f"bar: median ratio at least {MEDIAN}, lower end at least {LOWER}: {'missed by ' + '; '.join(missed) if missed else 'holds'}")
    return 1 if missed else 0
