"""Loads: how requests reach the engine, repetition by repetition, and the rows they leave."""
import hashlib
import math
import time
import traceback
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from workbook import arrivals, limits, metrics, progress
from workbook.engines import Answer, EngineDied, Request
from workbook.errors import Stopped
from workbook.params import REQUESTS_OF_P99, Exam
from workbook.subjects import Question

LATE, LATE_S = 0.1, 0.02
"""The most of the time to the first token that may be the client's own, where it is more than so many seconds."""


@dataclass(frozen=True)
class Repetition:
    """One measured pass of the load, or of one point of a sweep.

    Attributes:
        point: size of the batch, or requests under way, in a sweep; 0 where the exam is none.
        arrival: when the load began, seconds of `time.monotonic`.
        finished: when the last answer was in the caller's hands, on the same clock.
        counters: growth of the engine's counters over the repetition; of those that it showed before and after it.
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


class Unfinished(Stopped):
    """A pass that ended before all its answers were there; `found` is the repetition with those it has."""

    def __init__(self, sentence: str, found: Repetition):
        super().__init__(sentence)
        self.found = found


def measure(engine, exam: Exam, batch: list[Request], repetitions: int, what: str = "repetition", *, deadline: float = math.inf) -> list[Repetition]:
    """Drive the exam's load through the engine `repetitions` times, one after the other; in a sweep every point
    in each repetition. Arguments and exceptions as `passing`."""
    return list(passing(engine, exam, batch, [f"{what} {number}/{repetitions}" for number in range(1, repetitions + 1)], deadline=deadline))


def passing(engine, exam: Exam, batch: list[Request], labels: list[str], *, deadline: float = math.inf) -> Iterator[Repetition]:
    """The passes of the load, each as it ends: one for each label, in a sweep one for each of its points.

    Args:
        engine: any of `workbook.engines`.
        batch: all requests of the exam.
        labels: what to call each repetition.
        deadline: when the load gives up, seconds of `time.monotonic`.

    Raises:
        Unfinished: the engine died or failed, time was up, or somebody interrupted it.
    """
    for number, label in enumerate(labels, 1):
        for point in exam.points or [0]:
            yield _pass(engine, exam, batch, number, point, f"{label}{f', {exam.load} of {point}' if point else ''}", deadline)


def _pass(engine, exam: Exam, batch: list[Request], number: int, point: int, label: str, deadline: float) -> Repetition:
    if exam.load == "batch" and point:
        batch = batch[:point]
    answers: list[Answer] = []
    began = time.monotonic()
    try:
        before, _ = engine.counters(), engine.kv_cache_peak()
        done = _drive(engine, exam, batch, number, point, label, deadline, answers)
        growth = {name: value - before[name] for name, value in engine.counters().items() if name in before}
        peak = engine.kv_cache_peak()
    except (Exception, KeyboardInterrupt) as error:  # whatever it is, the passes before it were measured
        why = _why(error)
        have = sorted(answers, key=lambda a: (a.prompt_id, a.sample))
        raise Unfinished(f"{why} (in {label}, with {len(have):,} of {len(batch):,} answers)", Repetition(number, point, began, time.monotonic(), have, {})) from error
    # A batch has no schedule to fall behind: how long it takes to hand it over is part of its makespan.
    behind = done.behind() if exam.open_loop else ""
    if exam.load in ("poisson", "gamma"):  # to hand over a burst takes its time too
        behind = behind or late(done.late_s, done.replies)
    measured = {} if peak is None else {"kv_cache_peak_pct": peak}
    if exam.engine != "offline":
        measured["client_cpu_pct"] = 100 * done.cpu_s / (done.finished - done.started)
    return Repetition(number, point, done.started, done.finished, done.replies, growth, behind, measured)


def late(late_s: np.ndarray, answers: list[Answer]) -> str:
    """A sentence where requests were sent so late that the client's lateness, which counts in every time from the scheduled arrival, is
    more than `LATE` of the time to the first token, at the median or a percentile with as many requests beyond it as the
    99th has of 1,000; else empty."""
    waits = np.array([a.first_token - a.arrival for a in answers if a.first_token is not None and a.arrival is not None])
    for percent in [q for q in metrics.PERCENTILES if q == 50 or (100 - q) * len(waits) >= REQUESTS_OF_P99] if len(waits) else []:
        own, whole = np.percentile(late_s, percent), np.percentile(waits, percent)
        if own > max(LATE * whole, LATE_S):
            return (f"the load generator sent its requests late: {own * 1e3:.0f} ms of the {whole * 1e3:.0f} ms to the first token are its own (p{percent}); "
                    f"expected at most {LATE * 100:.0f} %")
    return ""


def _why(error: BaseException) -> str:
    """What ended a pass, in words: of errors of several requests the first. One that nobody foresaw goes to stderr too, with its place."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, EngineDied | TimeoutError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _drive(engine, exam: Exam, batch: list[Request], number: int, point: int, label: str, deadline: float, answers: list[Answer]) -> arrivals.Driven:
    """Run one pass to its end. `answers` gets each as it comes, so that they are there if the pass does not get so far.

    Raises:
        TimeoutError: it was not over at the deadline.
    """
    bar = progress.bar(label)
    if exam.engine == "offline":
        started = time.monotonic()
        with limits.interrupting(deadline):
            replies = engine.generate(batch, bar)
        return arrivals.Driven(started, time.monotonic(), replies, np.zeros(len(replies)))
    with progress.counting(bar, len(batch)) as count:
        def ended(answer: Answer) -> None:
            answers.append(answer)
            if count:
                count(answer)

        def driver() -> Coroutine:
            timeout_s = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
            if exam.load == "closed":
                return arrivals.closed_loop(engine.answer, batch, point, timeout_s=timeout_s, ended=ended)
            return arrivals.open_loop(engine.answer, batch, schedule(exam, len(batch), number), timeout_s=timeout_s, ended=ended)
        done = engine.run(driver, {"batch": len(batch), "closed": point}.get(exam.load, 0))
    if not done.complete:
        raise TimeoutError(limits.UP)
    return done


def unanswered(done: Repetition) -> str:
    """Why not a single request of a pass was answered, in a sentence; empty if one was."""
    reasons = Counter(a.finish_reason for a in done.answers if not a.output_tokens or a.finish_reason.startswith("error"))
    if reasons.total() < len(done.answers):
        return ""
    return "not one request was answered: " + "; ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common(2))


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
    return pd.concat([_rows(r, session) for r in done], ignore_index=True) if done else _rows(Repetition(0, 0, 0.0, 0.0, [], {}), session)


def _rows(r: Repetition, session: int) -> pd.DataFrame:
    """Columns and not rows: a repetition may have 100,000 requests."""
    def column(name: str, kind: type) -> np.ndarray:
        return np.fromiter((getattr(a, name) for a in r.answers), kind, len(r.answers))

    def seconds(name: str, missing: float = math.nan) -> np.ndarray:
        return np.fromiter((missing if (at := getattr(a, name)) is None else at - r.arrival for a in r.answers), float, len(r.answers))
    frame = pd.DataFrame({name: column(name, int) for name in ("prompt_id", "sample", "replica", "prompt_tokens", "max_tokens", "output_tokens")})
    for place, (name, value) in enumerate((("session", session), ("repetition", r.number), ("point", r.point))):
        frame.insert(place, name, np.full(len(r.answers), value))
    frame["finish_reason"] = pd.Series([a.finish_reason for a in r.answers], dtype=object)
    frame["arrival_s"], frame["finished_s"] = seconds("arrival", 0.0), r.finished - r.arrival
    for name in ("queued", "scheduled", "first_token", "last_token"):
        frame[f"{name}_s"] = seconds(name)
    frame["itl_ms"] = pd.Series([np.diff(np.asarray(a.chunk_times)).astype(np.float32) * 1e3 if len(a.chunk_times) else None for a in r.answers], dtype=object)
    return frame


def generations_frame(repetition: Repetition | None, questions: list[Question]) -> pd.DataFrame:
    """A row per prompt and sample of one repetition: prompt_id, sample, prompt, gold, answer, token_ids,
    prompt_token_ids, finish_reason. No row where there is no repetition."""
    by_id = {q.prompt_id: q for q in questions}
    answers = repetition.answers if repetition else []
    asked = [by_id[a.prompt_id] for a in answers]
    return pd.DataFrame({
        "prompt_id": [a.prompt_id for a in answers], "sample": [a.sample for a in answers], "prompt": [q.text for q in asked], "gold": [q.gold for q in asked],
        "answer": [a.text for a in answers], "token_ids": [np.asarray(a.token_ids, dtype=np.int32) for a in answers],
        "prompt_token_ids": [q.token_ids for q in asked], "finish_reason": [a.finish_reason for a in answers]})
