"""Loads: how requests reach the engine, repetition by repetition, and the rows they leave."""
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from workbook import progress
from workbook.engines import Answer, Request
from workbook.params import Exam
from workbook.subjects import Question


@dataclass(frozen=True)
class Repetition:
    """One measured pass of the load, or of one point of a sweep.

    Attributes:
        point: size of the batch in a sweep; 0 where the exam is none.
        arrival: when all requests were submitted, seconds of `time.monotonic`.
        finished: when the last answer was in the caller's hands, on the same clock.
        counters: growth of the engine's counters over the repetition.
    """
    number: int
    point: int
    arrival: float
    finished: float
    answers: list[Answer]
    counters: dict[str, float]


def requests(exam: Exam, questions: list[Question]) -> list[Request]:
    """n requests of one sample for each question, so that every sample has times of its own."""
    return [Request(q.prompt_id, sample, q.token_ids, q.max_tokens, request_seed(exam, q.prompt_id, sample))
            for q in questions for sample in range(exam.n)]


def request_seed(exam: Exam, prompt_id: int, sample: int) -> int | None:
    """Seed of one request, the same in every run; None where sampling is greedy."""
    if exam.temperature == 0:
        return None
    digest = hashlib.sha256(f"{exam.seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def measure(engine, batch: list[Request], repetitions: int, points: Sequence[int] = (), what: str = "repetition") -> list[Repetition]:
    """Drive the batch through the engine `repetitions` times, one after the other.

    Args:
        engine: any of `workbook.engines`.
        points: sizes of the batches to send in each repetition, the first requests of `batch` each; none: all of it.
    """
    return [_pass(engine, batch[:point or None], number, point, f"{what} {number}/{repetitions}{f', batch of {point}' if point else ''}")
            for number in range(1, repetitions + 1) for point in points or [0]]


def _pass(engine, batch: list[Request], number: int, point: int, label: str) -> Repetition:
    before = engine.counters()
    arrival = time.monotonic()
    answers = engine.generate(batch, progress.bar(label))
    finished = time.monotonic()
    growth = {name: value - before.get(name, 0.0) for name, value in engine.counters().items()}
    return Repetition(number, point, arrival, finished, answers, growth)


def passes(done: list[Repetition], session: int = 1) -> list[dict[str, Any]]:
    """What is kept of each pass beside its requests: session, repetition, point, makespan in seconds, and the
    growth of the engine's counters."""
    return [{"session": session, "repetition": r.number, "point": r.point, "makespan_s": r.finished - r.arrival, "counters": r.counters} for r in done]


def requests_frame(done: list[Repetition], session: int = 1) -> pd.DataFrame:
    """A row per request; times in seconds from its repetition's start.

    Columns: session, repetition, point (size of the batch in a sweep, else 0), prompt_id, sample, replica, prompt_tokens, max_tokens, output_tokens,
    finish_reason, arrival_s (scheduled), queued_s, scheduled_s, first_token_s, last_token_s (the engine's clock),
    finished_s (when the caller had the answer).
    """
    rows = []
    for r in done:
        for a in r.answers:
            row = {"session": session, "repetition": r.number, "point": r.point, "prompt_id": a.prompt_id, "sample": a.sample, "replica": a.replica,
                   "prompt_tokens": a.prompt_tokens, "max_tokens": a.max_tokens, "output_tokens": len(a.token_ids), "finish_reason": a.finish_reason,
                   "arrival_s": 0.0, "finished_s": r.finished - r.arrival}
            for name in ("queued", "scheduled", "first_token", "last_token"):
                at = getattr(a, name)
                row[f"{name}_s"] = float("nan") if at is None else at - r.arrival
            rows.append(row)
    return pd.DataFrame(rows)


def generations_frame(repetition: Repetition, questions: list[Question]) -> pd.DataFrame:
    """A row per prompt and sample of one repetition: prompt_id, sample, prompt, gold, answer, token_ids,
    prompt_token_ids, finish_reason."""
    by_id = {q.prompt_id: q for q in questions}
    return pd.DataFrame([{
        "prompt_id": a.prompt_id, "sample": a.sample, "prompt": by_id[a.prompt_id].text, "gold": by_id[a.prompt_id].gold,
        "answer": a.text, "token_ids": a.token_ids, "prompt_token_ids": by_id[a.prompt_id].token_ids,
        "finish_reason": a.finish_reason} for a in repetition.answers])
