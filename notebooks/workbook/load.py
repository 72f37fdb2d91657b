"""Loads: how requests reach the engine, repetition by repetition, and the rows they leave."""
import hashlib
import time
from dataclasses import dataclass

import pandas as pd

from workbook import progress
from workbook.engines import Answer, OfflineEngine, Request
from workbook.params import Exam
from workbook.subjects import Question


@dataclass(frozen=True)
class Repetition:
    """One measured pass of the load.

    Attributes:
        arrival: when all requests were submitted, seconds of `time.monotonic`.
        finished: when the last answer was in the caller's hands, on the same clock.
        counters: growth of the engine's counters over the repetition.
    """
    number: int
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


def measure(engine: OfflineEngine, batch: list[Request], repetitions: int, what: str = "repetition") -> list[Repetition]:
    """Drive the batch through the engine `repetitions` times, one after the other."""
    done = []
    for number in range(1, repetitions + 1):
        before = engine.counters()
        arrival = time.monotonic()
        answers = engine.generate(batch, progress.bar(f"{what} {number}/{repetitions}"))
        finished = time.monotonic()
        after = engine.counters()
        growth = {name: value - before.get(name, 0.0) for name, value in after.items()}
        done.append(Repetition(number, arrival, finished, answers, growth))
    return done


def requests_frame(done: list[Repetition], session: int = 1) -> pd.DataFrame:
    """A row per request; times in seconds from its repetition's start.

    Columns: session, repetition, prompt_id, sample, replica, prompt_tokens, max_tokens, output_tokens,
    finish_reason, arrival_s (scheduled), queued_s, scheduled_s, first_token_s, last_token_s (the engine's clock),
    finished_s (when the caller had the answer).
    """
    rows = []
    for r in done:
        for a in r.answers:
            row = {"session": session, "repetition": r.number, "prompt_id": a.prompt_id, "sample": a.sample, "replica": 0,
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
