"""Goldens: blessed baselines, one JSON a run and platform, found by what was asked and where."""
import datetime
import difflib
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from workbook import files, metrics, paths
from workbook.errors import BadInput

SCHEMA_VERSION = 1


class Part(BaseModel):
    """Strict parts of the file: an unknown or missing key is an error, not a guess."""
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Key(Part):
    """What must be equal for two runs to be comparable."""
    work: str
    prompts: str
    platform: str


class Samples(Part):
    """A metric's raw samples: a list for each engine session."""
    unit: str
    direction: str
    sessions: list[list[float]]


class Sequence(Part):
    """One golden token sequence and the log-probabilities of its answer, by prefill."""
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]


class Blessing(Part):
    """Who made this the golden, when and why, and what it replaced."""
    by: str
    when: str
    reason: str
    supersedes: str | None = None


class Golden(Part):
    """A baseline: key, subject, soft environment, controls, samples, correctness and sequences."""
    schema_version: int = SCHEMA_VERSION
    run: str
    key: Key
    subject: dict[str, Any]
    environment: dict[str, Any]
    controls: dict[str, list[list[float]]]
    metrics: dict[str, Samples]
    correct: list[list[bool]] | None
    sequences: list[Sequence]
    recorded: list[str]
    blessing: Blessing | None = None


def path_of(platform: str, run: str) -> Path:
    """File of a golden."""
    return paths.goldens() / platform / f"{run}.json"


def candidate_path(run: str) -> Path:
    """File of a candidate: recorded, not yet blessed."""
    return paths.reports() / "candidates" / f"{run}.json"


def read(path: Path) -> Golden:
    """Read and check a golden.

    Raises:
        BadInput: the file is missing, cut off or not a golden of this version.
    """
    values = files.read_json(path)
    if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
        found = values.get("schema_version") if isinstance(values, dict) else type(values).__name__
        raise BadInput(f"{path}: key 'schema_version' is {found!r}; expected {SCHEMA_VERSION}")
    try:
        return Golden(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"{path}: key '{'.'.join(map(str, first['loc']))}': {first['msg']}; expected a complete golden") from None


def find(run: str, key: Key) -> tuple[Golden | None, str]:
    """The golden for this run, work and platform, or None with a sentence that says why there is none.

    Raises:
        BadInput: there is one and it cannot be read.
    """
    path = path_of(key.platform, run)
    if not path.exists():
        others = sorted(p.parent.name for p in paths.goldens().glob(f"*/{run}.json"))
        nearest = difflib.get_close_matches(key.platform, others, n=1, cutoff=0.0)
        known = f"the nearest with one is '{nearest[0]}'" if nearest else "no platform has one"
        return None, f"no golden of '{run}' for '{key.platform}'; {known}"
    golden = read(path)
    if golden.key.work != key.work:
        return None, f"the golden of '{run}' for '{key.platform}' was recorded with other parameters"
    if golden.key.prompts != key.prompts:
        return None, f"the golden of '{run}' for '{key.platform}' was recorded with other prompts"
    return golden, ""


def key_of(record: dict[str, Any]) -> Key:
    """Key of a run from its `run.json`."""
    return Key(work=record["work_sha256"], prompts=record["prompts_sha256"], platform=record["machine"]["platform"])


def session_of(record: dict[str, Any], by_repetition: pd.DataFrame,
               scores: pd.DataFrame | None, sequences: list[dict]) -> Golden:
    """A golden made of one session, to be merged with others.

    Args:
        record: the session's `run.json`.
        by_repetition: a row per repetition, a column per metric.
        scores: rows of `scores.parquet` with prompt_id, sample and correct; None without a scorer.
        sequences: golden token sequences with their log-probabilities.
    """
    found = {name: metrics.sessions(by_repetition, name) for name in by_repetition}
    samples = {name: Samples(unit=metrics.kind(name).unit, direction=metrics.kind(name).direction, sessions=[[_rounded(v) for v in s] for s in values])
               for name, values in found.items() if np.isfinite(np.concatenate(values)).all()}
    return Golden(
        run=record["params"]["run"], key=key_of(record), subject=record["subject"], environment=record["machine"],
        controls={name: [[_rounded(v) for v in values]] for name, values in record["controls"].items()},
        metrics=samples, correct=None if scores is None else correctness(scores).tolist(),
        sequences=[Sequence(**s | {"logprobs": [round(x, 5) for x in s["logprobs"]]}) for s in sequences], recorded=[record["finished"]])


def merge(first: Golden, *others: Golden) -> Golden:
    """Sessions of the same work on the same platform and subject, pooled; answers and sequences are the first's, and
    a metric that one of them lacks is left out.

    Raises:
        BadInput: the sessions are not comparable.
    """
    for other in others:
        if other.key != first.key or other.subject != first.subject:
            raise BadInput(f"sessions of '{first.run}' differ in what was run: {other.key} {other.subject}; expected {first.key} {first.subject}")
    merged = first.model_copy(deep=True)
    merged.metrics = {name: samples for name, samples in merged.metrics.items() if all(name in other.metrics for other in others)}
    for other in others:
        for name, samples in merged.metrics.items():
            samples.sessions += other.metrics[name].sessions
        for name, sessions in merged.controls.items():
            sessions += other.controls[name]
        merged.recorded += other.recorded
    return merged


def bless(run: str, reason: str, by: str) -> Path:
    """Make the candidate of a run the golden of its platform.

    Raises:
        BadInput: no reason, or no candidate.
    """
    if not reason.strip():
        raise BadInput("REASON is empty; expected a sentence that says why this becomes the golden")
    path = candidate_path(run)
    if not path.exists():
        raise BadInput(f"{path}: no candidate; expected `make record RUN={run}` first")
    candidate = read(path)
    place = path_of(candidate.key.platform, run)
    previous = read(place).recorded[0] if place.exists() else None
    candidate.blessing = Blessing(by=by, when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                                  reason=reason, supersedes=previous)
    try:
        keep(place)
        write(place, candidate)
    except OSError as error:
        raise BadInput(f"{place}: cannot be written ({error.strerror}); expected a writable folder, GOLDBOOK_GOLDENS names another") from None
    return place


def keep(path: Path) -> None:
    """Copy a golden or candidate that is about to be replaced to `reports/history/goldens/`."""
    if path.exists():
        name = f"{path.stem}-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S.%fZ}.json"
        place = paths.reports() / "history" / "goldens" / path.parent.name / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place)


def write(path: Path, golden: Golden) -> None:
    """Write a golden in one step; the same golden always gives the same bytes."""
    files.write_json(path, golden.model_dump(mode="json"))


def correctness(scores: pd.DataFrame) -> np.ndarray:
    """Right or wrong as an array (questions, samples) of booleans."""
    return scores.pivot(index="prompt_id", columns="sample", values="correct").to_numpy(dtype=bool)


def control_moves(golden: Golden, controls: dict[str, list[float]]) -> dict[str, float]:
    """How far the median of each control lies outside the range of the golden's session medians, as a fraction
    of the nearer end: 0 inside, positive where it is slower than the slowest session, negative where faster
    than the fastest."""
    moves = {}
    for name in sorted(golden.controls.keys() & controls.keys()):
        medians = [float(np.median(session)) for session in golden.controls[name]]
        now = float(np.median(controls[name]))
        moves[name] = now / min(max(now, min(medians)), max(medians)) - 1
    return moves


def differences(golden: Golden, record: dict[str, Any]) -> list[dict[str, str]]:
    """What is not as it was when the golden was recorded: subject and soft environment, a row each."""
    before = flat(golden.subject) | flat({"machine": golden.environment})
    after = flat(record["subject"]) | flat({"machine": record["machine"]})
    return [{"what": name, "golden": str(before.get(name, "absent")), "now": str(after.get(name, "absent"))}
            for name in sorted(before | after) if before.get(name) != after.get(name) and not name.startswith(("machine.packages", "machine.git.commit"))]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with a dot between the names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _rounded(value: float) -> float:
    """Six significant digits: more than any clock gives, and a git diff that can be read."""
    return float(f"{value:.6g}") if math.isfinite(value) else value
