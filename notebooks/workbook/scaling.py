"""Scaling: what several accelerators give against one, where a result of the same exam on one is at hand.

Strong scaling holds the same load against one accelerator, weak scaling (Gustafson, 1988) the same load on each: of a
sweep of batches, 4,096 in flight on eight against 512 on one."""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbook import files, goldens, metrics, paths, platforms
from workbook.errors import BadInput
from workbook.params import Exam

PARALLEL = ("data_parallel", "tensor_parallel", "pipeline_parallel", "expert_parallel", "enable_expert_parallel", "distributed_executor")
"""How the engine arguments begin that spread an engine over accelerators."""


@dataclass(frozen=True)
class One:
    """A result of the same work on one accelerator.

    Attributes:
        what: the run, or the golden, for the reader.
        when: when it was measured, ISO 8601.
        medians: of its metrics, by name.
        unlike: its versions that are others than this run's, in words; empty where none is.
    """
    what: str
    when: str
    medians: dict[str, float]
    unlike: str = ""


def against_one(exam: Exam, record: dict[str, Any], medians: dict[str, float]) -> dict[str, Any] | None:
    """Speed-up and efficiency (speed-up / accelerators) of the output tok/s over one accelerator; None where the run
    used fewer than two, nothing comparable is at hand, or requests arrive by a schedule: whatever keeps up with it ends with it.

    The latest valid result of another variant of the exam's file on one GPU of the kind counts, else such a variant's
    golden; one of the same packages and driver before one of others, which is said. The work, the prompts, the model, its weights, the environment and the engine's arguments have to be the
    same, apart from replicas and parallel sizes, and from the points of a sweep of batches of random prompts.

    Args:
        record: the run's `run.json`.
        medians: the run's metrics by name, medians over its repetitions.

    Returns:
        accelerators, against, when, unlike; `points`: for each point of a sweep (`output_tok_s@32`, or `output_tok_s`) that one
        accelerator was asked too, its speedup and efficiency; `each`: for each point of which one accelerator was asked
        that accelerator's share (`of`, its metric), likewise.
    """
    gpus = len(record["machine"]["gpus"])
    if gpus < 2 or exam.open_loop or not (one := _stored(exam, record) or _golden(exam, record)):
        return None

    def held(name: str, other: str) -> dict[str, float]:
        return {"speedup": medians[name] / one.medians[other], "efficiency": medians[name] / one.medians[other] / gpus}
    names = [name for name in medians if name.partition("@")[0] == metrics.THROUGHPUT]
    points = {name: held(name, name) for name in names if one.medians.get(name)}
    shares = {name: f"{metrics.THROUGHPUT}@{int(point) // gpus}" for name in names if (point := name.partition("@")[2]) and int(point) % gpus == 0}
    each = {name: {"of": of} | held(name, of) for name, of in shares.items() if one.medians.get(of)}
    return {"accelerators": gpus, "against": one.what, "when": one.when, "unlike": one.unlike, "points": points, "each": each} if points or each else None


def sentence(found: dict[str, Any] | None) -> str:
    """The scaling at the largest point in words, with the same load on each accelerator where that was measured; empty
    where there is none."""
    if not found:
        return ""
    points = found["each"] or found["points"]
    name = metrics.headline(points)
    load = f" with {points[name]['of'].partition('@')[2]} on each" if found["each"] else ""
    return (f"{found['accelerators']} GPUs give {points[name]['speedup']:.2f} × one{load} ({points[name]['efficiency'] * 100:.0f} % efficiency), "
            f"against {found['against']} of {found['when'][:10]}{found['unlike'] and ', which had ' + found['unlike']}")


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each point of the sweep: metric, and the speed-up and efficiency at the same load in all and on each."""
    return [{"metric": name, "speedup": found["points"].get(name, {}).get("speedup"), "efficiency": found["points"].get(name, {}).get("efficiency"),
             "speedup, same on each": found["each"].get(name, {}).get("speedup"), "efficiency, same on each": found["each"].get(name, {}).get("efficiency")}
            for name in sorted({*found["points"], *found["each"]}, key=lambda name: int(name.partition("@")[2] or 0))]


def curves(results: Iterable[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The speed-up over one GPU by the number of GPUs, of the runs that have one (their result's `scaling`), at the largest point
    as in `sentence`.

    Returns:
        By what each line is of (the exam, how it was spread, the load): (GPUs, speed-up), one GPU first.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        if scaled := result.get("scaling"):
            points = scaled["each"] or scaled["points"]
            name = metrics.headline(points)
            load = f", {points[name]['of'].partition('@')[2]} on each" if scaled["each"] else f", {name.partition('@')[2]} in all" if "@" in name else ""
            line = found.setdefault(f"{_stem(result['run'])}, {_spread(result['params'])}{load}, against {scaled['against']}", [(1, 1.0)])
            line.append((scaled["accelerators"], points[name]["speedup"]))
    return {what: sorted(line) for what, line in found.items()}


def _spread(parameters: dict[str, Any]) -> str:
    """How a run's engines were spread over the GPUs, in words."""
    sizes = [key.removesuffix("_size").replace("_", " ") for key, size in parameters["engine_args"].items() if key.startswith(PARALLEL) and key.endswith("_size") and size > 1]
    return " and ".join([*["replicas"] * (parameters["replicas"] > 1), *sizes])


def _stored(exam: Exam, record: dict[str, Any]) -> One | None:
    """The latest result of a variant on one GPU in the reports."""
    found = []
    for folder in (paths.reports() / "runs").glob(f"{_stem(exam.run)}*"):
        try:
            other, result = (files.read_json(folder / name) for name in ("run.json", "result.json"))
            same = _stem(folder.name) == _stem(exam.run) and _is_same_work(exam, record, goldens.key_of(other), other["subject"], _points(result["metrics"]))
            if same and result["status"] != "INVALID" and result["metrics"]:
                found.append(One(folder.name, other["finished"], {name: row["median"] for name, row in result["metrics"].items()}, _unlike(other["subject"], record["subject"])))
        except (BadInput, KeyError, TypeError):  # a run that did not get to its end has no such files, or less in them
            continue
    return max(found, key=lambda one: (not one.unlike, one.when), default=None)


def _golden(exam: Exam, record: dict[str, Any]) -> One | None:
    """The golden of a variant on one GPU."""
    found = []
    for path in sorted((paths.goldens() / _one_of(record)).glob(f"{_stem(exam.run)}*.json")):
        try:
            golden = goldens.read(path)
        except BadInput:  # said where that variant is compared
            continue
        if "imported" in golden.subject:  # nobody knows what engine it was
            continue
        if _stem(golden.run) == _stem(exam.run) and _is_same_work(exam, record, golden.key, golden.subject, _points(golden.metrics)):
            medians = {name: float(np.median(np.concatenate(samples.sessions))) for name, samples in golden.metrics.items()}
            found.append(One(f"the golden of {golden.run}", golden.recorded[-1], medians, _unlike(golden.subject, record["subject"])))
    return min(found, key=lambda one: bool(one.unlike), default=None)


def _is_same_work(exam: Exam, record: dict[str, Any], key: goldens.Key, subject: dict[str, Any], points: list[int]) -> bool:
    """Whether something on one GPU of the kind did what this run did, apart from how it was spread: with as many engines on
    its GPU as this run had on each. A batch of random prompts is the same work whichever other batches are in the sweep: all
    have the same lengths."""
    changes: dict[str, Any] = {"replicas": max(1, exam.replicas * platforms.workers(exam) // len(record["machine"]["gpus"]))}
    prompts = record["prompts_sha256"]
    if exam.subject == "random" and exam.load == "batch" and exam.points and points:
        changes |= {"concurrency": points, "num_prompts": max(points) // exam.n}
        prompts = key.prompts
    alone = goldens.Key(work=exam.model_copy(update=changes).work_hash(), prompts=prompts, platform=_one_of(record))
    return key == alone and _unspread(subject) == _unspread(record["subject"])


def _points(names: Iterable[str]) -> list[int]:
    """The points of the sweep that the metrics are of; empty where it was none."""
    return sorted({int(point) for name in names if name.startswith(f"{metrics.THROUGHPUT}@") and (point := name.partition("@")[2])})


def _unspread(subject: dict[str, Any]) -> tuple:
    arguments = {k: v for k, v in subject["engine_args"].items() if not k.startswith(PARALLEL)}
    return subject["model"], subject["weights_sha256"], subject["env"], arguments


def _unlike(one: dict[str, Any], now: dict[str, Any]) -> str:
    """What of the software is not as it is now, in words."""
    before, after = (side.get("packages", {}) | {"driver": side.get("driver")} for side in (one, now))
    return ", ".join(f"{name} {before.get(name)} (now {after.get(name)})" for name in sorted(before | after) if before.get(name) != after.get(name))


def _one_of(record: dict[str, Any]) -> str:
    """The platform of one such GPU."""
    return f"{record['machine']['platform'].rpartition(' x')[0]} x1"


def _stem(run: str) -> str:
    """The params file of a run."""
    return run.partition("@")[0]
