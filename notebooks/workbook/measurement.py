"""A session's load: a warm-up until it is stable, the measured repetitions with controls between them, and what there is
when it ends early."""
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from workbook import controls, files, load, metrics, platforms, runs, schemas
from workbook.engines import Request
from workbook.errors import Stopped
from workbook.params import Exam
from workbook.subjects import Question

AGREE = 0.02
"""Two passes in a row whose tok/s differ by no more than this are stable: less than any gate's margin, and about what
repetitions of a warm engine differ by."""
MOST_PASSES = 5
"""An exam of a few seconds on a busy machine may never agree so well, and must not wait for it: what a first pass
still has to set up (compilation, caches, clocks) is there after two or three."""


@dataclass
class WarmUp:
    """The unmeasured passes.

    Attributes:
        tok_s: output tok/s of each, in a sweep over all its points.
        stable: whether the last two agree; None where the exam gives the number of passes.
    """
    tok_s: list[float] = field(default_factory=list)
    stable: bool | None = None

    @property
    def sentence(self) -> str:
        """What was done, for the report."""
        passes = f"{len(self.tok_s)} pass{'' if len(self.tok_s) == 1 else 'es'}"
        if self.stable is False:
            return f"warm-up: not yet stable after {passes}" + (f": the last two differ by {_apart(self.tok_s) * 100:.1f} %" if len(self.tok_s) > 1 else "")
        rates = f" at {', '.join(f'{rate:,.0f}' for rate in self.tok_s)} tok/s" if self.tok_s else ""
        return f"warm-up: {passes}{rates}" + (f"; the last two agree within {AGREE * 100:.0f} %" if self.stable else "")

    def record(self) -> dict[str, Any]:
        """For `run.json`."""
        return {"passes": len(self.tok_s), "tok_s": self.tok_s, "stable": self.stable, "sentence": self.sentence}


@dataclass
class Session:
    """What came of an exam's load.

    Attributes:
        done: the measured passes; where the load ended early, the one that was under way is the last, with the
            answers it has.
        controls: seconds of `controls.beside` before the first measured pass and after each, by name.
        stopped: why it ended early, a sentence; empty if all of it was measured.
        interrupted: whether that was somebody's wish.
    """
    warmup: WarmUp = field(default_factory=WarmUp)
    done: list[load.Repetition] = field(default_factory=list)
    controls: dict[str, list[float]] = field(default_factory=dict)
    stopped: str = ""
    interrupted: bool = False

    def control(self, beside: Callable[[], dict[str, float]]) -> None:
        """Time the controls once more."""
        for name, seconds in beside().items():
            self.controls.setdefault(name, []).append(seconds)

    def record(self, number: int = 1, startup_s: float = 0.0) -> dict[str, Any]:
        """For `run.json`; `number` is the session's, `startup_s` as `load.passes`. Hits of the prefix cache, those of a KV connector
        among them, are None where not every pass has a count of the cache's own."""
        hits = [r.counters.get(metrics.HITS[0]) for r in self.done]
        return {"finished": runs.now(), "mark": uuid.uuid4().hex[:12], "repetitions": load.passes(self.done, number, startup_s), "warmup": self.warmup.record(),
                "prefix_cache_hits": None if None in hits else sum(r.counters.get(name, 0.0) for r in self.done for name in metrics.HITS)}


def measure(engine, exam: Exam, batch: list[Request], deadline: float = math.inf, what: str = "") -> Session:
    """Warm up, then measure the exam's repetitions. Never raises for what goes wrong in the load: a dead engine, an
    interruption, no answer at all, or time that is up end the session, and it says so.

    Args:
        engine, batch, deadline: as `load.passing`.
        what: which session this is, in front of what its passes are called.
    """
    found = Session()
    labels = [f"{what}repetition {i}/{exam.repetitions}" for i in range(1, exam.repetitions + 1)]
    try:
        with controls.beside(cpu=exam.engine != "endpoint" and not platforms.gpus()) as beside:
            warm_up(engine, exam, batch, found.warmup, deadline, what)
            found.control(beside)
            for done in load.passing(engine, exam, batch, labels, deadline=deadline):
                found.done.append(done)
                _refuse_silence(done, labels[done.number - 1])
                found.control(beside)
    except Stopped as early:
        found.stopped, found.interrupted = str(early), isinstance(early.__cause__, KeyboardInterrupt)
        if isinstance(early, load.Unfinished):
            found.done.append(early.found)
    except KeyboardInterrupt:  # between two passes
        found.stopped, found.interrupted = "interrupted", True
    return found


def warm_up(engine, exam: Exam, batch: list[Request], warmup: WarmUp, deadline: float = math.inf, what: str = "") -> None:
    """Drive the load unmeasured, as often as the exam says, and note in `warmup` how fast each pass was.

    With `auto` that is until two passes in a row agree within `AGREE`, at most `MOST_PASSES`, and not when another
    one would leave too little time for the repetitions.

    Raises:
        Stopped: as `load.passing`, or not one request was answered.
    """
    auto = exam.warmup == "auto"
    for number in range(1, (MOST_PASSES if auto else exam.warmup) + 1):
        label, began = f"{what}warm-up {number}", time.monotonic()
        try:
            done = list(load.passing(engine, exam, batch, [label], deadline=deadline))
        except load.Unfinished as early:
            raise Stopped(str(early)) from early.__cause__  # its answers are none that anybody measures
        for point in done:
            _refuse_silence(point, label)
        warmup.tok_s.append(sum(a.output_tokens for p in done for a in p.answers) / sum(p.finished - p.arrival for p in done))
        if auto:
            warmup.stable = number > 1 and _apart(warmup.tok_s) <= AGREE
            took = time.monotonic() - began
            if warmup.stable or time.monotonic() + (exam.repetitions + 1) * took > deadline:
                return


def _refuse_silence(done: load.Repetition, label: str) -> None:
    """A load that nobody answers is not driven to its end: what follows would be as empty."""
    if sentence := load.unanswered(done):
        raise Stopped(f"{sentence} (in {label})")


def _apart(tok_s: list[float]) -> float:
    """By how much the last two passes differ, as a fraction of the slower."""
    return max(tok_s[-2:]) / min(tok_s[-2:]) - 1


def keep(folder: Path, exam: Exam, found: Session, questions: list[Question], samples: pd.DataFrame, record: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write a session's rows: `requests.parquet`, `generations.parquet` (of the first repetition that has every
    request, in a sweep of its last point, as `goldens.answers_of`; else of the last) and `telemetry.parquet`; returns the first two.

    Raises:
        Stopped: the load ended early. The rows are written, and `record` as a `run.json` that is marked partial.
    """
    whole = [r for r in found.done if len(r.answers) == exam.num_prompts * exam.n] or found.done[-1:]
    judged = max(whole, key=lambda r: (-r.number, r.point), default=None)
    requests, generations = load.requests_frame(found.done), load.generations_frame(judged, questions)
    for name, frame in (("requests", requests), ("generations", generations), ("telemetry", samples)):
        files.write_parquet(folder / f"{name}.parquet", frame)
    if found.stopped:
        runs.write_record(folder, exam, **record, partial=found.stopped)
        schemas.write_result(folder / "result.json", schemas.stopped(exam.run, "INVALID", found.stopped, exam, "generate"))
        raise Stopped(found.stopped)
    return requests, generations
