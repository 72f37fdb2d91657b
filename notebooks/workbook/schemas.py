"""The schema of `result.json`, checked whenever one is written or read, and the JSON Schemas of the files that last."""
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from workbook import files, goldens
from workbook.errors import BadInput
from workbook.params import Exam
from workbook.scraps import plain
from workbook.statuses import ORDER

RESULT_VERSION = 1
DIGITS = 9
"""Significant digits of a result's numbers: more than is known of any, and without the noise of binary fractions."""
Number = float | None


class Part(BaseModel):
    """Strict: an unknown key is an error; numbers are finite, and null where there is none."""
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Question(Part):
    """One of the questions of the first screen, with its answer."""
    question: str
    answer: str


class Metric(Part):
    """A metric's samples by session, and its golden's."""
    unit: str
    direction: Literal["higher", "lower"]
    sessions: list[list[Number]]
    median: Number
    golden_sessions: list[list[float]] | None
    golden_median: Number


class Result(Part):
    """Everything one run found. What a run that did not get to its comparison cannot have is optional."""
    schema_version: Literal[1]
    run: str
    title: str
    status: Literal[ORDER]
    sentence: str
    brief: str | None = None
    stopped_in: str | None
    questions: list[Question]
    metrics: dict[str, Metric]
    gates: dict[str, dict[str, Any]]
    looks: list[dict[str, Any]] = []
    finished: str | None = None
    platform: str | None = None
    accuracy: dict[str, Any] | None = None
    drift: dict[str, Any] | None = None
    answers: dict[str, dict[str, Any] | None] = {}
    controls: dict[str, Any] | None = None
    validity: dict[str, Any] | None = None
    load_s: Number = None
    subject: dict[str, Any] | None = None
    params: dict[str, Any] | None = None
    golden: dict[str, Any] | None = None
    scaling: dict[str, Any] | None = None
    seconds: Number = None


FILES = {"golden": goldens.Golden, "result": Result}
"""What `python -m workbook schema` knows."""


def json_schema(name: str) -> str:
    """JSON Schema (draft 2020-12) of a kind of file, as `docs/schemas/<name>.json` holds it."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | FILES[name].model_json_schema()
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a `result.json` that is one.

    Raises:
        BadInput: a key is missing, unknown or of the wrong type.
    """
    _check(path, result)
    files.write_json(path, _rounded(result))


def stopped(run: str, status: str, sentence: str, exam: Exam | None = None, stage: str | None = None) -> dict[str, Any]:
    """The result of a run that did not get to its comparison (INVALID) or was not started (SKIPPED)."""
    return plain({"schema_version": RESULT_VERSION, "run": run, "title": exam.title if exam else "", "status": status,
                  "sentence": sentence, "stopped_in": stage, "questions": [], "metrics": {}, "gates": {}})


def brief(result: dict[str, Any]) -> str:
    """A result's sentence in brief; whole where it has but that: what was stopped, or written before there was a brief one."""
    return result.get("brief") or result["sentence"]


def read_result(path: Path) -> dict[str, Any]:
    """Read and check a `result.json`.

    Raises:
        BadInput: it is missing, cut off, of another version, or not a result.
    """
    result = files.read_json(path)
    _check(path, result)
    return result


def _check(path: Path, result: Any) -> None:
    version = result.get("schema_version") if isinstance(result, dict) else type(result).__name__
    if version != RESULT_VERSION:
        raise BadInput(f"{path}: key 'schema_version' is {version!r}; expected {RESULT_VERSION}: run it again with this version")
    try:
        Result.model_validate(result)
    except ValidationError as error:
        raise BadInput(f"{path}: {goldens.first_error(error)}; expected a result of schema version {RESULT_VERSION}") from None


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return goldens.rounded(value, DIGITS) if isinstance(value, float) else value
