"""Loads: how requests reach the engine, repetition by repetition, and the rows they leave."""
import hashlib
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from workbook import arrivals, progress
from workbook.engines import Answer, Request
from workbook.params import Exam
from workbook.subjects import Question


@dataclass(frozen=True)
class Repetition:
    """One measured pass of the load, or of one point of a sweep.

    Attributes:
        point: size of the batch, or requests under way, in a sweep; 0 where the exam is none.
        arrival: when the load began, seconds of `time.monotonic`.
        finished: when the last answer was in the caller's hands, on the same clock.
        counters: growth of the engine's counters over the repetition.
        behind: a sentence if the load generator fell behind its own schedule; else empty.
        measured: what else was measured of the pass, by metric.
    """
    number: int
    point: int
    arrival: float
    finished: float
    answers: list[Answer]
    counters: dict[str, float]
    behind: str = ""
    measured: dict[str, float] = field(default_factory=dict)


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


def measure(engine, exam: Exam, batch: list[Request], repetitions: int, what: str = "repetition") -> list[Repetition]:
    """Drive the exam's load through the engine `repetitions` times, one after the other; in a sweep every point
    in each repetition.

    Args:
        engine: any of `workbook.engines`.
        batch: all requests of the exam.
    """
    return [_pass(engine, exam, batch, number, point, f"{what} {number}/{repetitions}{f', {exam.load} of {point}' if point else ''}")
            for number in range(1, repetitions + 1) for point in exam.points or [0]]


def _pass(engine, exam: Exam, batch: list[Request], number: int, point: int, label: str) -> Repetition:
    if exam.load == "batch" and point:
        batch = batch[:point]
    before, _ = engine.counters(), engine.kv_cache_peak()
    done = _drive(engine, exam, batch, number, point, progress.bar(label))
    growth = {name: value - before.get(name, 0.0) for name, value in engine.counters().items()}
    peak = engine.kv_cache_peak()
    # A batch has no schedule to fall behind: how long it takes to hand it over is part of its makespan.
    behind = done.behind() if exam.load in ("poisson", "gamma", "burst") else ""
    return Repetition(number, point, done.started, done.finished, done.replies, growth, behind, {} if peak is None else {"kv_cache_peak_pct": peak})


def _drive(engine, exam: Exam, batch: list[Request], number: int, point: int, bar) -> arrivals.Driven:
    if exam.engine == "offline":
        started = time.monotonic()
        answers = engine.generate(batch, bar)
        return arrivals.Driven(started, time.monotonic(), answers, np.zeros(len(answers)))
    with progress.counting(bar, len(batch)) as ended:
        if exam.load == "closed":
            return engine.run(arrivals.closed_loop(engine.answer, batch, point, ended=ended))
        return engine.run(arrivals.open_loop(engine.answer, batch, schedule(exam, len(batch), number), ended=ended))


def schedule(exam: Exam, count: int, repetition: int) -> np.ndarray:
    """When each of `count` requests is due, seconds from the start; another draw in each repetition, the same in
    every run."""
    seed = exam.seed + repetition
    if exam.load == "poisson":
        return arrivals.poisson(count, exam.request_rate, seed)
    if exam.load == "gamma":
        return arrivals.gamma(count, exam.request_rate, exam.burstiness, seed)
    if exam.load == "burst":
        (size,) = exam.concurrency
        return arrivals.burst(count, size, size / exam.request_rate)
    return arrivals.batch(count)


def passes(done: list[Repetition], session: int = 1, startup_s: float = 0.0) -> list[dict[str, Any]]:
    """What is kept of each pass beside its requests: session, repetition, point, makespan in seconds, the growth
    of the engine's counters, whether the load fell behind, and what else was measured of it, by metric.

    Args:
        startup_s: what the engine took to start, measured once and so kept with the first pass; 0 for one that ran before.
    """
    found = [{"session": session, "repetition": r.number, "point": r.point, "makespan_s": r.finished - r.arrival, "counters": r.counters,
              "behind": r.behind, "measured": dict(r.measured)} for r in done]
    if found and startup_s:
        found[0]["measured"]["startup_s"] = startup_s
    return found


def requests_frame(done: list[Repetition], session: int = 1) -> pd.DataFrame:
    """A row per request; times in seconds from its repetition's start.

    Columns: session, repetition, point (of a sweep, else 0), prompt_id, sample, replica, prompt_tokens,
    max_tokens, output_tokens, finish_reason, arrival_s (scheduled), queued_s, scheduled_s, first_token_s,
    last_token_s (the engine's clock; a client's where it is reached over HTTP), finished_s (when the caller had the
    repetition's last answer), itl_ms (gaps between the chunks of a stream; None without one).
    """
    rows = []
    for r in done:
        for a in r.answers:
            row = {"session": session, "repetition": r.number, "point": r.point, "prompt_id": a.prompt_id, "sample": a.sample, "replica": a.replica,
                   "prompt_tokens": a.prompt_tokens, "max_tokens": a.max_tokens, "output_tokens": a.output_tokens, "finish_reason": a.finish_reason,
                   "arrival_s": 0.0 if a.arrival is None else a.arrival - r.arrival, "finished_s": r.finished - r.arrival}
            for name in ("queued", "scheduled", "first_token", "last_token"):
                at = getattr(a, name)
                row[f"{name}_s"] = float("nan") if at is None else at - r.arrival
            row["itl_ms"] = np.diff(np.asarray(a.chunk_times)).astype(np.float32) * 1e3 if len(a.chunk_times) else None
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
