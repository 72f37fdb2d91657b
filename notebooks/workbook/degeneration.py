"""Degeneration: answers that arrived and are worth nothing, as rates over all answers.

A sign belongs to one answer and may be chance; a rate above its ceiling is a model, a sampler or a tokenizer that is
broken, and makes the run INVALID. Below it the golden's rates are what counts (`quality.judge_rates`).
"""
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from workbook.params import CEILINGS, Exam

SAID = {"empty": "are empty", "cut_off": "are cut off before the model stops", "loop": "end in a repetition loop", "one_token": "are one token over and over",
        "invalid_utf8": "have bytes that are no text (U+FFFD)", "special_tokens": "go on past a special token, or have the text of one"}
SAID_OF_ONE = {"empty": "is empty", "cut_off": "is cut off before the model stops", "loop": "ends in a repetition loop", "one_token": "is one token over and over",
               "invalid_utf8": "has bytes that are no text (U+FFFD)", "special_tokens": "goes on past a special token, or has the text of one"}
"""What is wrong with answers, and with one, for the sentence."""
LOOP_TIMES, LOOP_TOKENS = 3, 16
"""A loop is a phrase that stands at least three times at the end of an answer, as in Holtzman et al. 2020 ("The Curious
Case of Neural Text Degeneration", 5.2), and over so many tokens: three zeros at the end of a number are no loop."""
SAME_TOKENS, SAME_SHARE = 8, 0.9
"""An answer of at least so many tokens, of which such a share is one and the same."""
WORD = re.compile(r"\w+|[^\w\s]")
FEW = 3
"""No one or two answers make a run INVALID, unless they are all there are."""


class Tally(NamedTuple):
    """How many answers have a sign (of `identical`: questions), of how many, and how many of each question's."""
    count: int
    of: int
    questions: list[int]

    @property
    def share(self) -> float:
        return self.count / self.of

    def without(self, other: "Tally") -> "Tally":
        """What is left when those that another counted of the same questions are taken away."""
        return Tally(self.count - other.count, self.of - other.of, [a - b for a, b in zip(self.questions, other.questions, strict=True)])


def watched(exam: Exam) -> list[str]:
    """The signs that mean something for an exam: none where the end of the text is ignored or the weights are
    synthetic; `cut_off` where the limit is the exam's own, `identical` where samples are drawn."""
    off = {"cut_off": not exam.max_tokens, "identical": exam.n == 1 or exam.temperature == 0}
    return [name for name in CEILINGS if not off.get(name)] if exam.free_to_stop else []


def signs(exam: Exam, generations: pd.DataFrame, special: Mapping[int, str], ends: Collection[int]) -> pd.DataFrame:
    """A row for each answer, a column of booleans for each sign that is watched.

    Args:
        generations: columns prompt_id, answer, token_ids (empty where a server returns none) and finish_reason.
        special: text of each token id with a meaning of its own (`tokens.Tokenizer.special`).
        ends: those that no answer has but at its end. Others may be part of one (the channels of gpt-oss), but not of its text.
    """
    leaked = re.compile("|".join(map(re.escape, special.values()))) if special else None
    rows = [_signs(answer, np.asarray(ids, dtype=np.int64), reason, set(ends), leaked)
            for answer, ids, reason in zip(generations.answer, generations.token_ids, generations.finish_reason, strict=True)]
    found = pd.DataFrame(rows, columns=list(SAID), index=generations.index, dtype=bool)
    found["identical"] = generations.groupby("prompt_id").answer.transform("nunique") == 1
    return found[watched(exam)]


def tally(exam: Exam, scores: pd.DataFrame) -> dict[str, Tally]:
    """Count each watched sign, over the answers and in each question, in the order of prompt_id.

    Args:
        scores: prompt_id and the columns of `signs`; of a run that was scored before there were any, nothing is counted.
    """
    found = {}
    for name in (n for n in watched(exam) if n in scores):
        by_question = scores.groupby("prompt_id")[name]
        counts = (by_question.any() if name == "identical" else by_question.sum()).astype(int)
        found[name] = Tally(int(counts.sum()), len(counts) if name == "identical" else len(scores), counts.tolist())
    return found


def problems(exam: Exam, found: Mapping[str, Tally]) -> list[str]:
    """Sentences on the rates that are above their ceilings; the exam's own ceilings win."""
    limit = ceilings(exam)
    return [f"{sentence(name, t)}; the ceiling of '{name}' is {limit[name] * 100:.0f} %" for name, t in found.items()
            if t.count > limit[name] * t.of and t.count >= min(FEW, t.of)]


def ceilings(exam: Exam) -> dict[str, float]:
    """The share of each sign above which a run of the exam is INVALID."""
    return CEILINGS | exam.ceilings


def sentence(name: str, found: Tally) -> str:
    """A rate in words."""
    if name == "identical":
        return f"all samples are the same for {found.count:,} of {found.of:,} questions ({percent(found.share)})"
    said = SAID[name] if found.count != 1 else SAID_OF_ONE[name]
    return f"{found.count:,} of {found.of:,} answers {said} ({percent(found.share)})"


def percent(share: float) -> str:
    """A share in whole per cent; what is there and rounds to none is not called none."""
    return "under 1 %" if share > 0 and f"{share * 100:.0f}" == "0" else f"{share * 100:.0f} %"


def _signs(answer: str, ids: np.ndarray, reason: str, ends: set[int], leaked: re.Pattern | None) -> tuple[bool, ...]:
    """In the order of `SAID`."""
    if not len(ids):
        words = WORD.findall(answer)
        ids = np.unique(words, return_inverse=True)[1] if words else ids
        middle = False
    else:
        while len(ids) and reason == "stop" and int(ids[-1]) in ends:
            ids = ids[:-1]
        middle = not ends.isdisjoint(ids.tolist())
    whole = answer.rstrip("\ufffd") if reason == "length" else answer  # a cut may go through a character
    return (not answer.strip(), reason == "length", loops(ids), collapsed(ids), "\ufffd" in whole, middle or bool(leaked and leaked.search(answer)))


def loops(ids: np.ndarray) -> bool:
    """Whether the last tokens are one phrase, at least `LOOP_TIMES` times and over at least `LOOP_TOKENS` tokens.

    Of a phrase of length p that is: every token of that stretch but the first p is the one p before it. A loop that is
    cut off within its phrase is one of the phrase turned around.
    """
    count = len(ids)
    for length in count - 1 - np.flatnonzero(ids[:-1] == ids[-1]) if count else ():
        stretch = max(LOOP_TIMES * length, LOOP_TOKENS)
        if stretch <= count and np.array_equal(ids[count - stretch + length:], ids[count - stretch:count - length]):
            return True
    return False


def collapsed(ids: np.ndarray) -> bool:
    """Whether nearly all tokens are one and the same."""
    return len(ids) >= SAME_TOKENS and np.unique(ids, return_counts=True)[1].max() >= SAME_SHARE * len(ids)
