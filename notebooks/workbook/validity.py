"""Validity: did every answer arrive? Comes before any comparison."""
from collections import Counter
from dataclasses import dataclass

import pandas as pd

from workbook.params import Exam

FINISHED = ("stop", "length")
"""Finish reasons of an answer that the engine completed."""


@dataclass(frozen=True)
class Completeness:
    """What came back of what was asked.

    Attributes:
        expected, arrived: answers, prompts x n x repetitions.
        empty: share of answers without a visible character.
        cut_off: share stopped by `max_tokens` (of no meaning under `ignore_eos`).
        problems: sentences, each of which makes the run INVALID.
    """
    expected: int
    arrived: int
    empty: float
    cut_off: float
    problems: list[str]


def check(exam: Exam, requests: pd.DataFrame, generations: pd.DataFrame, weights: str) -> Completeness:
    """Check a session's rows against what the exam asked for.

    Args:
        requests, generations: `requests.parquet` and `generations.parquet`.
        weights: hash of the weights that were loaded.
    """
    expected = exam.num_prompts * exam.n * exam.repetitions
    done = requests[requests.finish_reason.isin(FINISHED) & (requests.output_tokens > 0)]
    problems = []
    missing = expected - len(done.drop_duplicates(["session", "repetition", "prompt_id", "sample"]))
    if missing:
        reasons = Counter(requests.finish_reason) - Counter(done.finish_reason)
        problems.append(f"{missing} of {expected} answers are missing or failed ({dict(reasons) or 'no row'})")
    if len(requests) > expected:
        problems.append(f"{len(requests) - expected} answers more than the {expected} that were asked for")
    if len(generations) != exam.num_prompts * exam.n:
        problems.append(f"generations.parquet has {len(generations)} rows; expected {exam.num_prompts * exam.n}")
    if requests[["first_token_s", "last_token_s"]].isna().any(axis=None):
        problems.append("the engine gave no times for some requests")
    if exam.ignore_eos and len(short := done[done.finish_reason != "length"]):
        problems.append(f"{len(short)} answers stopped early although end-of-sequence is ignored")
    if exam.weights_sha256 and exam.weights_sha256 != weights:
        problems.append(f"the weights loaded have SHA-256 {weights[:12]}...; key 'weights_sha256' asserts {exam.weights_sha256[:12]}...")
    empty = generations.answer.str.strip().eq("").mean() if len(generations) else 1.0
    return Completeness(expected, len(done), float(empty), float((requests.finish_reason == "length").mean()), problems)
