"""Sessions of a run: the first, which generate.ipynb takes, and the confirming one that compare.ipynb may add.

`run.json` describes the first session, and the confirming one under `confirmation`: controls, busy, load_s,
prefix_cache_hits and repetitions, as of the first, or `problem`, why it failed. It is written last, so that rows of
a session that it does not know are what a crash left, and are not read.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from workbook import (controls, engines, files, goldens, limits, load, measurement, metrics, models, params, paths, platforms, roofline, runs, subjects, telemetry,
                      tokens, validity)
from workbook.errors import Stopped
from workbook.params import Exam
from workbook.statuses import IN_DOUBT

CONFIRMING = 2
"""Number of the confirming session. There is none after it: nothing is retried until it is green."""


@dataclass(frozen=True)
class Measured:
    """What the sessions of a run measured.

    Attributes:
        record: `run.json`.
        requests: rows of `load.requests_frame`, of all its sessions.
    """
    exam: Exam
    record: dict[str, Any]
    requests: pd.DataFrame

    @property
    def confirmed(self) -> bool:
        """Whether the confirming session has been taken, whatever came of it."""
        return "confirmation" in self.record

    @property
    def each(self) -> list[dict[str, Any]]:
        """The record of each session that came to its end, the first session first."""
        more = self.record.get("confirmation", {"problem": ""})
        return [self.record] + ([] if "problem" in more else [more])

    @property
    def controls(self) -> list[dict[str, list[float]]]:
        """The times of the controls, seconds, of each session."""
        return [session["controls"] for session in self.each]

    @property
    def by_repetition(self) -> pd.DataFrame:
        """Metrics of every repetition, as `metrics.by_repetition`."""
        passes = [p for session in self.each for p in session["repetitions"]]
        return metrics.by_repetition(self.requests, passes, max(1, len(self.record["machine"]["gpus"])), self.exam.slo)

    def apart(self) -> list["Measured"]:
        """Each session that came to its end alone, the first one first."""
        run = {k: v for k, v in self.record.items() if k != "confirmation"}
        return [dataclasses.replace(self, record=run | session, requests=self.requests[self.requests.session == number])
                for number, session in enumerate([run, *self.each[1:]], start=1)]


def read(run: str) -> Measured:
    """What a run has measured so far.

    Raises:
        BadInput: generate.ipynb has not been run for it.
    """
    record = runs.read_record(run)
    found = Measured(params.check(record["params"], f"{run}/run.json"), record, pd.read_parquet(paths.run_folder(run) / "requests.parquet"))
    return dataclasses.replace(found, requests=found.requests[found.requests.session <= len(found.each)])


def check(measured: Measured, generations: pd.DataFrame, logprobs: list[list[float | None]] = (), worthless: list[str] = ()) -> validity.Completeness:
    """Validity of all sessions, each checked alone; what the answers and weights are worth is the first one's.

    Args:
        generations, logprobs, worthless: as `validity.check`.
    """
    exam, requests, weights = measured.exam, measured.requests, measured.record["subject"]["weights_sha256"]
    parts = [validity.check(exam, requests[requests.session == number], generations, weights=weights, cached=session["prefix_cache_hits"],
                            **({} if number == CONFIRMING else {"logprobs": logprobs, "worthless": worthless}), behind=[p["behind"] for p in session["repetitions"] if p["behind"]],
                            disturbed=session["disturbed"], lacking=metrics.lacking(alone.by_repetition, exam.gates))
             for number, (session, alone) in enumerate(zip(measured.each, measured.apart(), strict=True), start=1)]
    problems = parts[0].problems + [f"the confirming session is invalid: {problem}" for part in parts[1:] for problem in part.problems]
    if failed := measured.record.get("confirmation", {}).get("problem"):
        problems.append(f"the confirming session failed: {failed}")
    return validity.Completeness(sum(p.expected for p in parts), sum(p.arrived for p in parts), parts[0].empty,
                                 float((requests.finish_reason == "length").mean()), problems, parts[0].unknown)


def pooled(measured: Measured, scores: pd.DataFrame, sequences: list[dict[str, Any]], parted: tuple[int, int] | None) -> goldens.Golden:
    """The sessions as what a golden is made of; answers, sequences and where those part are the first session's.

    Args:
        scores, sequences, parted: as `goldens.session_of`.
    """
    first, *others = measured.apart()
    return goldens.merge(goldens.session_of(first.record, first.by_repetition, scores, sequences, first.requests, parted),
                         *(goldens.session_of(other.record, other.by_repetition, None, [], other.requests) for other in others))


def wanted(measured: Measured, status: str) -> bool:
    """Whether the first look's status asks for a confirming session, none has been taken, and this is the platform
    to take it on (a run's folder may have been copied from elsewhere, to be read)."""
    here = platforms.platform_id(measured.exam) == measured.record["machine"]["platform"]
    return status in IN_DOUBT and here and not measured.confirmed


def confirm(measured: Measured) -> Measured:
    """Take the confirming session in this process, which must not have used vLLM, and keep it beside the first.

    A session that fails is recorded with its problem and never taken again; the first one's data stay as they are.
    """
    folder, exam = paths.run_folder(measured.exam.run), measured.exam
    try:
        session, requests, samples = _take(exam, measured.record, folder / "engine.log")
    except Exception as error:  # whatever it is, it is the run's result, and the first session is kept
        session = {"problem": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}
    else:
        _add(folder / "requests.parquet", requests)
        _add(folder / "telemetry.parquet", samples.assign(session=CONFIRMING))
    files.write_json(folder / "run.json", measured.record | {"confirmation": session | {"finished": runs.now()}})
    return read(exam.run)


def _take(exam: Exam, first: dict[str, Any], log: Path) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """The steps of generate.ipynb, in its order: the session's record, its requests and its telemetry.

    Args:
        first: record of the first session.
    """
    if foreign := platforms.foreign_processes(exam):
        raise RuntimeError(f"another process is using the accelerator: {', '.join(foreign)}")
    model = models.resolve(exam)
    questions = subjects.questions(exam, tokens.Tokenizer(model), models.window(exam, model))
    control_times = controls.measure(platforms.accelerators_used(exam))
    engine = engines.start(exam, model, log)
    same = {"weights_sha256": models.verified_sha256(exam, model), "model": engine.serves, "attention": engine.attention_backend(), "packages": platforms.versions()}
    if changed := _changed(first, subjects.prompt_set_sha256(questions), same):
        engine.close()
        raise RuntimeError(f"changed since the first session: {', '.join(changed)}")
    gpus = [g.index for g in platforms.used_gpus(exam)]
    with telemetry.Sampler(gpus, engine.metrics_urls) as sampler:
        measured = measurement.measure(engine, exam, load.requests(exam, questions), limits.deadline(exam.timeout_s), "confirming session, ")
    if measured.interrupted:  # no outcome of the session: it may be taken again
        raise KeyboardInterrupt
    if measured.stopped:  # the engine may hang in its own shutdown, and goes with the kernel anyway
        raise Stopped(measured.stopped)
    engine.close()
    done, samples, windows = measured.done, sampler.frame(), [(r.arrival, r.finished) for r in measured.done]
    telemetry.note(done, samples, here=exam.engine != "endpoint")
    roofline.note(exam, done, first["roof"] and roofline.Calibration(**first["roof"]), log)
    record = measured.record(CONFIRMING, engine.load_s) | {
        "session": CONFIRMING, "controls": control_times | measured.controls, "load_s": engine.load_s, "busy": telemetry.busy(samples, windows),
        "disturbed": telemetry.disturbances(samples, windows, gpus), "telemetry_problem": sampler.problem}
    return record, load.requests_frame(done, CONFIRMING), samples


def _changed(first: dict[str, Any], prompts_sha256: str, subject: dict[str, Any]) -> list[str]:
    """What is not as it was in the first session, so that another thing would be measured."""
    found = [name for name, value in subject.items() if first["subject"].get(name) != value]
    return found + ([] if prompts_sha256 == first["prompts_sha256"] else ["prompts"])


def _add(path: Path, rows: pd.DataFrame) -> None:
    """Put the confirming session's rows behind the first one's, in one step; rows that a crash left are dropped."""
    before = pd.read_parquet(path)
    before = before[before.session < CONFIRMING] if "session" in before else before.assign(session=1)
    files.write_parquet(path, pd.concat([part for part in (before, rows) if len(part)] or [before], ignore_index=True))
