"""What answers look like against the golden's: rates of degeneration, lengths, greedy tokens, and the questions that flipped.

Samples of one question are not independent of each other, so everything here is compared question by question.
"""
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from workbook import accuracy, degeneration, drift, goldens
from workbook.degeneration import Tally
from workbook.goldens import Golden
from workbook.params import CEILINGS

RISE = 0.02
"""A rate that rose by less than two points did not."""
ALPHA = 0.01
"""The p below which answers count as worse, shared by the rates of a run (Bonferroni): they are looked at together."""
SHORTEST, LONGEST = 0.9, 1.1
"""Mean length of the answers as a fraction of the golden's."""


def tallies(golden: Golden) -> dict[str, Tally]:
    """The rates that a golden keeps."""
    return {name: Tally(count, of, golden.signs[name]) for name, (count, of) in golden.rates.items()}


def judge_rates(found: Mapping[str, Tally], golden: Golden | None, ceilings: Mapping[str, float] = CEILINGS) -> dict[str, Any] | None:
    """Did a rate rise? A sign-flip test of each question's share (`accuracy.sign_flip`), one-sided; p < `ALPHA` over the number of
    rates in which any question differs (a rate without a difference cannot be a false alarm: Tarone, Biometrics 46, 1990),
    and `RISE` or more. Fisher's exact test would take the samples of a question, and the golden's sessions, which draw with the same seeds,
    for independent. Four rates at once give a false alarm in 0.7 % of runs or fewer (tests/test_quality.py).

    Returns:
        status, sentence, and of each rate count, of, ceiling, golden (count and of), p and status; None where none is watched.
    """
    if not found:
        return None
    known = tallies(golden) if golden else {}
    lost = {name: accuracy.differences(-np.array(known[name].questions), _samples(known[name]), -np.array(now.questions), _samples(now))
            for name, now in found.items() if name in known}
    each: dict[str, dict[str, Any]] = {}
    for name, now in found.items():
        each[name] = {"count": now.count, "of": now.of, "ceiling": ceilings[name], "golden": None, "p": None, "status": "NO_GOLDEN"}
        if name in lost:
            p, before = accuracy.sign_flip(lost[name]), known[name]
            worse = p < ALPHA / max(1, sum(map(np.any, lost.values()))) and round(now.share - before.share, 12) >= RISE
            each[name] |= {"golden": [before.count, before.of], "p": p, "status": "REGRESSED" if worse else "PASSED"}
    rose = [f"{degeneration.sentence(name, found[name])}, {degeneration.percent(known[name].share)} of the golden's (p = {row['p']:.2g})"
            for name, row in each.items() if row["status"] == "REGRESSED"]
    status = "REGRESSED" if rose else "PASSED" if lost else "NO_GOLDEN"
    return {"status": status, "sentence": "; ".join(rose) or ("no more degenerate answers than the golden's" if lost else ""), "rates": each}


def judge_lengths(lengths: np.ndarray, golden: Golden | None) -> dict[str, Any] | None:
    """Are the answers as long as the golden's? A paired t test of the questions' mean lengths, two-sided, p < `ALPHA`, and a ratio
    of the means outside `SHORTEST` to `LONGEST`; None where the golden keeps no lengths.

    Args:
        lengths: output tokens by question and sample.
    """
    if not golden or golden.lengths is None:
        return None
    ratio, p, off = compare_lengths(np.array(golden.lengths), lengths)
    before, now = float(np.mean(golden.lengths)), float(lengths.mean())
    sentence = f"answers are {ratio * 100:.0f} % as long as the golden's ({now:.1f} tokens, {before:.1f} then"
    sentence += f"; expected {SHORTEST * 100:.0f} % to {LONGEST * 100:.0f} %; p = {p:.2g})" if off else ")"
    return {"status": "REGRESSED" if off else "PASSED", "sentence": sentence, "ratio": ratio, "mean": now, "golden": before, "p": p}


def compare_lengths(before: np.ndarray, now: np.ndarray, alpha: float = ALPHA) -> tuple[float, float, bool]:
    """Two sets of answers to the same questions, by their output tokens (questions, samples): ratio of the means, p of a paired t test of
    the questions' means (two-sided), and whether the second are of another length (`judge_lengths`)."""
    moved = now.mean(axis=1) - before.mean(axis=1)
    p = float(np.nan_to_num(stats.ttest_1samp(moved, 0).pvalue, nan=1.0)) if np.ptp(moved) else float(len(moved) < 2 or not moved[0])
    ratio = float(now.mean() / before.mean())
    return ratio, p, not SHORTEST <= ratio <= LONGEST and p < alpha


def judge_parting(new: tuple[int, int] | None, golden: Golden | None) -> dict[str, Any] | None:
    """Do greedy answers part from the golden's sequences earlier than those of its own sessions did (`drift.parts_more`)? None where
    the golden, or the run, has nothing to say of it."""
    if not (golden and golden.parted and new):
        return None
    p = drift.parts_more(golden.parted, new)
    sentence = (f"{new[0]} of {len(golden.sequences)} greedy answers part from the golden's, one in {_one_in(new)} tokens; "
                f"in its own sessions one in {_one_in(golden.parted)} (p = {p:.2g})")
    return {"status": "REGRESSED" if p < drift.ALPHA else "PASSED", "sentence": sentence, "parted": list(new), "golden": list(golden.parted), "p": p}


def flipped(scores: pd.DataFrame, generations: pd.DataFrame, golden: Golden | None, rows: int = 10, tail: int = 300) -> pd.DataFrame:
    """Questions of which other samples, or more or fewer, are right than were for the golden: those that lost most first.

    Returns:
        The question and its right answer, the answers stated then (– for none; empty where an older golden keeps none) and now, how many were
        right, and the end of the first answer that changed. Texts are as the model wrote them.
    """
    if golden is None or golden.correct is None:
        return pd.DataFrame()
    before, now = np.array(golden.correct, dtype=bool), goldens.correctness(scores)
    change = now.sum(axis=1) / now.shape[1] - before.sum(axis=1) / before.shape[1]
    found = []
    for index in np.argsort(change, kind="stable"):
        if change[index]:
            found.append(_flip(scores, generations, golden, int(index), before[index], now[index], tail))
    lost, gained = found[:int((change < 0).sum())], found[int((change < 0).sum()):][::-1]
    return pd.DataFrame((lost + gained)[:rows])


def _flip(scores: pd.DataFrame, generations: pd.DataFrame, golden: Golden, index: int, before: np.ndarray, now: np.ndarray, tail: int) -> dict[str, str]:
    prompt = sorted(scores.prompt_id.unique())[index]
    mine = scores[scores.prompt_id == prompt].sort_values("sample")
    differs = np.flatnonzero(now != before) if len(now) == len(before) else []
    first = mine.iloc[int(differs[0]) if len(differs) else 0]
    return {"prompt": generations.prompt[generations.prompt_id == prompt].iloc[0][-tail:], "gold": first.gold, "right then": f"{before.sum()} of {len(before)}",
            "answers then": _said(golden.stated[index]) if golden.stated else "", "right now": f"{now.sum()} of {len(now)}", "answers now": _said(mine.stated),
            "end of one that changed": first.answer[-tail:]}


def table(right: dict | None, rates: dict | None, lengths: dict | None) -> pd.DataFrame:
    """Accuracy, rates and length beside the golden's, a row each."""
    found = []
    if right:
        then = f"{right['golden'] * 100:.1f} % ({right['golden_low'] * 100:.1f} % to {right['golden_high'] * 100:.1f} %)" if "golden" in right else "–"
        found.append(("accuracy (95 % interval)", f"{right['value'] * 100:.1f} % ({right['low'] * 100:.1f} % to {right['high'] * 100:.1f} %)", then, right.get("p"), "", right["status"]))
    for name, row in (rates or {"rates": {}})["rates"].items():
        then = "–" if row["golden"] is None else _share(*row["golden"])
        found.append((name, _share(row["count"], row["of"]), then, row["p"], f"{row['ceiling'] * 100:.0f} %", row["status"]))
    if lengths:
        found.append(("output tokens, mean", f"{lengths['mean']:.1f}", f"{lengths['golden']:.1f}", lengths["p"], "", lengths["status"]))
    return pd.DataFrame(found, columns=["answers", "now", "golden", "p", "ceiling", "verdict"])


def _said(stated) -> str:
    return ", ".join(text or "–" for text in stated)


def _share(count: int, of: int) -> str:
    return f"{count / of * 100:.1f} % ({count:,} of {of:,})"


def _samples(found: Tally) -> int:
    return found.of // len(found.questions)


def _one_in(parted: tuple[int, int]) -> str:
    return f"{parted[1] / parted[0]:,.0f}" if parted[0] else f"more than {parted[1]:,}"
