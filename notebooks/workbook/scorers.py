"""Scorers: is an answer right? A registry of functions (answer, gold) -> bool; adding one is a function and a test.

`gold` is a GSM8K answer with its `#### 42` line, or a bare number. `numeric` is the workbook's own; the others do what
their projects do, faults included, so that a figure can be held against theirs.
"""
import re
from collections.abc import Callable
from fractions import Fraction

import pandas as pd

from workbook import answers

SPACED = re.compile(r"[-−–+]?\s*\d{1,3}(?:\s\d{3})*(?:\.\d+)?")
"""A number whose thousands may be parted by spaces, no-break ones too, as may its sign."""
VERL_TAIL = 300
"""Characters of the answer that verl's scorer looks at, the last ones (verl/utils/reward_score/gsm8k.py)."""
HASHES = re.compile(r"#### (\-?[0-9\.\,]+)")
VERL_NUMBER = re.compile(r"(\-?[0-9\.\,]+)")
LM_EVAL_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
LM_EVAL_TAIL = 200
LM_EVAL_IGNORED = [re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$")]
"""What its exact match takes out of both sides, in this order (lm_eval/tasks/gsm8k/gsm8k.yaml)."""


def numeric(answer: str, gold: str) -> bool:
    """Whether the final answer, in whatever form it is stated, is the gold number: `answers.stated`."""
    return not answers.stated(answer).isdisjoint(gold_values(gold))


def verl_strict(answer: str, gold: str) -> bool:
    """verl, method "strict": the last `#### number` of the last 300 characters, as a text."""
    found = HASHES.findall(answer[-VERL_TAIL:])
    return bool(found) and found[-1].replace(",", "").replace("$", "") == _verl_gold(gold)


def verl_flexible(answer: str, gold: str) -> bool:
    """verl, method "flexible": the last number of the last 300 characters, as a text with its commas."""
    found = VERL_NUMBER.findall(answer[-VERL_TAIL:])
    return next((text for text in reversed(found) if text not in ("", ".")), None) == _verl_gold(gold)


def lm_eval_strict(answer: str, gold: str) -> bool:
    """lm-evaluation-harness, filter "strict-match": the first `#### number`."""
    found = HASHES.search(answer)
    return _lm_eval_equal(found[1] if found else "[invalid]", gold)


def lm_eval_flexible(answer: str, gold: str) -> bool:
    """lm-evaluation-harness, filter "flexible-extract": the last run of digits, signs of money, points and commas."""
    tail = answer[-LM_EVAL_TAIL:].partition(" ")[2]  # a number has no space in it: those behind one are whole
    found = LM_EVAL_NUMBER.findall(tail) or LM_EVAL_NUMBER.findall(answer)
    return _lm_eval_equal((found[-1][0] or found[-1][1]).strip() if found else "[invalid]", gold)


def gold_values(gold: str) -> frozenset[Fraction]:
    """Values of the right answer: of what is behind its `####`, or of all of it. There spaces may part thousands and follow
    a sign, which in the text of an answer would be a list or a subtraction."""
    right = gold.rpartition("####")[2].strip()
    if SPACED.fullmatch(right):
        right = "".join(right.split())
    return answers.stated(f"#### {right}")


def _verl_gold(gold: str) -> str:
    """The right answer as verl's data preparation stores it (examples/data_preprocess/gsm8k.py)."""
    found = HASHES.search(gold)
    return (found[1] if found else gold.strip()).replace(",", "")


def _lm_eval_equal(answer: str, gold: str) -> bool:
    sides = [answer, gold]
    for pattern in LM_EVAL_IGNORED:
        sides = [pattern.sub("", side) for side in sides]
    return sides[0].lower() == sides[1].lower()


SCORERS: dict[str, Callable[[str, str], bool]] = {
    "numeric": numeric, "verl_strict": verl_strict, "verl_flexible": verl_flexible, "lm_eval_strict": lm_eval_strict, "lm_eval_flexible": lm_eval_flexible}


def judge(answered: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """The rows with a column of booleans for each scorer, `correct`, which is the first one's, and `stated`, the final
    answer in digits.

    Args:
        answered: columns gold and answer.
    """
    columns = {name: [SCORERS[name](answer, gold) for answer, gold in zip(answered.answer, answered.gold, strict=True)] for name in names}
    return answered.assign(**columns, correct=columns[names[0]], stated=[answers.label(answers.stated(answer)) for answer in answered.answer])


def majority(scores: pd.DataFrame) -> float:
    """Share of questions whose most frequent stated answer is right (of equally frequent ones the first), as lm-eval's
    `maj@k`; a sample that states none has no vote."""
    votes = scores[scores.stated != ""]
    right = [rows.correct[rows.stated == rows.stated.value_counts(sort=False).idxmax()].any() for _, rows in votes.groupby("prompt_id")]
    return sum(right) / scores.prompt_id.nunique()


def matrix(scores: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """A row for each scorer: per cent right, and per cent of the answers that it finds right and another wrong."""
    share = {name: {"right": scores[name].mean()} | {f"not {other}": (scores[name] & ~scores[other]).mean() for other in names} for name in names}
    return (pd.DataFrame(share).T * 100).rename_axis("scorer").reset_index()


def disputed(scores: pd.DataFrame, names: list[str], rows: int = 10, tail: int = 200) -> pd.DataFrame:
    """The first answers on which the scorers disagree: gold, who finds it right, and the end of the answer."""
    votes = scores[names]
    found = scores[votes.any(axis=1) & ~votes.all(axis=1)].head(rows)
    return pd.DataFrame({"gold": found.gold, "right by": [", ".join(n for n in names if row[n]) for _, row in found.iterrows()],
                         "end of the answer": [f"…{text[-tail:]}" if len(text) > tail else text for text in found.answer]})
