"""Any two stored runs, one held against the other with the rule that holds a run against its golden."""
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbook import accuracy, drift, exams, files, goldens, machine, metrics, paths, quality, results, suspects
from workbook.errors import BadInput
from workbook.params import Exam, Gate
from workbook.statuses import overall


def load(what: str) -> tuple[goldens.Golden, Exam | None]:
    """A stored run, and its exam; None of a golden, which does not keep it.

    Args:
        what: name of a run in `reports/runs/`, the folder of one (in `reports/history/`, or copied from elsewhere),
            or the file of a golden.

    Raises:
        BadInput: there is no such run, or it has no valid session.
    """
    named, given = paths.run_folder(what), Path(what)
    if given.is_file():
        return goldens.read(given), None
    folder = next((f for f in (named, given) if f.is_dir()), None)
    if folder is None:
        raise BadInput(f"'{what}' is no stored run; expected a name in {paths.run_folder('')}, a run's folder, or a golden's file")
    if not any((folder / name).exists() for name in ("params.yaml", "result.json", "session.json")):
        raise BadInput(f"{folder}: is no run's folder; expected one of those in {paths.run_folder('')} or in the history beside it")
    if not (folder / "session.json").exists():
        said = files.read_json(folder / "result.json").get("sentence", "") if (folder / "result.json").exists() else "it did not get to its comparison"
        raise BadInput(f"{folder}: holds no valid session ({said}); expected a run that is complete")
    return goldens.read(folder / "session.json"), Exam(**files.read_json(folder / "run.json")["params"])


def compare(a: goldens.Golden, b: goldens.Golden, exam: Exam | None = None) -> tuple[list[str], pd.DataFrame, str]:
    """Hold run b against run a.

    Args:
        exam: of one of them: what is judged, or if it has no gates the throughput that stands for the run, and whether answers are
            drawn; where it is not known they may be.

    Returns:
        Sentences, each with its status, in which run a is called A; the medians of all metrics of both, a row each; the status over all.

    Raises:
        BadInput: the two did different work.
    """
    for part, what in (("work", "other parameters"), ("prompts", "other prompts")):
        if getattr(a.key, part) != getattr(b.key, part):
            raise BadInput(f"'{a.run}' of {a.recorded[0]} and '{b.run}' of {b.recorded[0]} do not compare: they ran with {what}{exams.apart(a.work, b.work, 'for the other')}")
    gates = (exam and exam.gates) or {metrics.headline(b.metrics): Gate()}
    parts = [(judged["status"], judged["sentence"]) for judged in speed(a, b, gates).values()]
    if a.correct is not None and b.correct is not None and goldens.same_scorer(a, b.scorer):
        drop = accuracy.compare(np.array(a.correct, dtype=bool), np.array(b.correct, dtype=bool), sampled=not exam or exam.temperature > 0)
        parts.append((drop.status, f"accuracy {np.mean(b.correct) * 100:.1f} %, {drop.sentence}"))
    lengths = b.lengths and quality.judge_lengths(np.array(b.lengths), a)
    parts += [(found["status"], found["sentence"]) for found in (quality.judge_rates(quality.tallies(b), a), lengths) if found and found["status"] != "NO_GOLDEN"]
    if a.sequences and drift.same(a.sequences, b.sequences):
        moved = results.judge_drift(a, [s.logprobs for s in b.sequences])
        parts.append((moved["status"], moved["sentence"]))
        if found := quality.judge_parting(b.parted, a):
            parts.append((found["status"], found["sentence"]))
    # What judges calls the side that it holds a run against "the golden"; here it need not be one.
    return [f"{status}: {sentence.replace('the golden', 'A')}" for status, sentence in parts], _medians(a, b), overall([status for status, _ in parts])


def speed(a: goldens.Golden, b: goldens.Golden, gates: dict[str, Gate]) -> dict[str, dict[str, Any]]:
    """The outcome of each gated metric of run b held against run a, fixed work included, as `results.judge_speed`."""
    return results.judge_speed(gates, a, {name: samples.sessions for name, samples in b.metrics.items()}, _machine(a, b, gates))


def _machine(a: goldens.Golden, b: goldens.Golden, gates: dict[str, Gate]) -> dict:
    """Whether the machine ran at the same speed for both; of two platforms the report says that they differ."""
    if a.key.platform != b.key.platform:
        return machine.judge(a, {}, samples={})
    return machine.judge(a, *({name: sessions[i] for name, sessions in b.controls.items()} for i in range(len(b.sessions))),
                         samples={name: samples.sessions for name, samples in b.metrics.items()}, judged=gates)


def _medians(a: goldens.Golden, b: goldens.Golden) -> pd.DataFrame:
    rows = []
    for name in b.metrics:
        if name in a.metrics:
            before, after = (float(np.median(np.concatenate(side.metrics[name].sessions))) for side in (a, b))
            rows.append({"metric": name, "unit": b.metrics[name].unit, "better": b.metrics[name].direction, "A": before, "B": after,
                         "median change %": 100 * (after / before - 1) if before else 0.0 if after == before else float("nan")})
    return pd.DataFrame(rows)


def _counted(run: goldens.Golden) -> str:
    return f"{len(run.recorded)} session{'' if len(run.recorded) == 1 else 's'}"


def report(one: str, other: str) -> tuple[str, str]:
    """The text of a comparison of two stored runs, and its status. Raises BadInput as `load` and `compare`."""
    (a, before), (b, exam) = load(one), load(other)
    sentences, table, status = compare(a, b, exam or before)
    lines = [f"A  {one}  ({a.run}, {a.key.platform}, {_counted(a)} from {a.recorded[0]})",
             f"B  {other}  ({b.run}, {b.key.platform}, {_counted(b)} from {b.recorded[0]})", "", *sentences]
    if a.key.platform != b.key.platform:
        lines.append("the two platforms differ: a change of speed may be theirs")
    lines += ["", table.to_string(index=False, float_format=metrics.number)]
    if differs := suspects.differences(a, {"subject": b.subject, "machine": b.environment}):
        lines += ["", "What differs:", *(f"  {d['what']}: {d['golden']} -> {d['now']}" for d in differs)]
    return "\n".join([*lines, "", f"B against A: {status}"]), status
