"""Scaling: what several accelerators give against one, where a result of the same exam on one is at hand."""
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbook import files, goldens, metrics, paths
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
    """
    what: str
    when: str
    medians: dict[str, float]


def against_one(exam: Exam, record: dict[str, Any], medians: dict[str, float]) -> dict[str, Any] | None:
    """Speed-up and efficiency (speed-up / accelerators) of the output tok/s over one accelerator; None where the run
    used fewer than two, or nothing comparable is at hand.

    The latest valid result of another variant of the exam's file on one GPU of the kind counts, else such a variant's
    golden. The work, the prompts, the model, its weights, the environment and the engine's arguments have to be the
    same, apart from replicas and parallel sizes.

    Args:
        record: the run's `run.json`.
        medians: the run's metrics by name, medians over its repetitions.

    Returns:
        accelerators, against, when, and for each point of a sweep (`output_tok_s@32`, or `output_tok_s`) its speedup
        and efficiency.
    """
    gpus = len(record["machine"]["gpus"])
    if gpus < 2 or not (one := _stored(exam, record) or _golden(exam, record)):
        return None
    points = {name: {"speedup": medians[name] / one.medians[name], "efficiency": medians[name] / one.medians[name] / gpus}
              for name in medians if name.partition("@")[0] == metrics.THROUGHPUT and one.medians.get(name)}
    return {"accelerators": gpus, "against": one.what, "when": one.when, "points": points} if points else None


def sentence(found: dict[str, Any] | None) -> str:
    """The scaling at the largest point in words; empty where there is none."""
    if not found:
        return ""
    at = found["points"][metrics.headline(found["points"])]
    return f"{found['accelerators']} GPUs give {at['speedup']:.2f} × one ({at['efficiency']:.0%} efficiency), against {found['against']} of {found['when'][:10]}"


def _stored(exam: Exam, record: dict[str, Any]) -> One | None:
    """The latest result of a variant on one GPU in the reports."""
    found = []
    for folder in (paths.reports() / "runs").glob(f"{_stem(exam.run)}*"):
        try:
            other, result = (files.read_json(folder / name) for name in ("run.json", "result.json"))
            same = _stem(folder.name) == _stem(exam.run) and _is_same_work(exam, record, goldens.key_of(other), other["subject"])
            if same and result["status"] != "INVALID" and result["metrics"]:
                found.append(One(folder.name, other["finished"], {name: row["median"] for name, row in result["metrics"].items()}))
        except (BadInput, KeyError, TypeError):  # a run that did not get to its end has no such files, or less in them
            continue
    return max(found, key=lambda one: one.when, default=None)


def _golden(exam: Exam, record: dict[str, Any]) -> One | None:
    """The golden of a variant on one GPU."""
    for path in sorted((paths.goldens() / _one_of(record)).glob(f"{_stem(exam.run)}*.json")):
        try:
            golden = goldens.read(path)
        except BadInput:  # said where that variant is compared
            continue
        if _stem(golden.run) == _stem(exam.run) and _is_same_work(exam, record, golden.key, golden.subject):
            medians = {name: float(np.median(np.concatenate(samples.sessions))) for name, samples in golden.metrics.items()}
            return One(f"the golden of {golden.run}", golden.recorded[-1], medians)
    return None


def _is_same_work(exam: Exam, record: dict[str, Any], key: goldens.Key, subject: dict[str, Any]) -> bool:
    """Whether something on one GPU of the kind did what this run did, apart from how it was spread."""
    alone = goldens.Key(work=exam.model_copy(update={"replicas": 1}).work_hash(), prompts=record["prompts_sha256"], platform=_one_of(record))
    return key == alone and _unspread(subject) == _unspread(record["subject"])


def _unspread(subject: dict[str, Any]) -> tuple:
    arguments = {k: v for k, v in subject["engine_args"].items() if not k.startswith(PARALLEL)}
    return subject["model"], subject["weights_sha256"], subject["env"], arguments


def _one_of(record: dict[str, Any]) -> str:
    """The platform of one such GPU."""
    return f"{record['machine']['platform'].rpartition(' x')[0]} x1"


def _stem(run: str) -> str:
    """The params file of a run."""
    return run.partition("@")[0]
