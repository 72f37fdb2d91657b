"""Goldens: blessed baselines, one JSON a run and platform, found by what was asked and where."""
import difflib
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from workbook import degeneration, distributions, drift, exams, files, metrics, params, paths, platforms
from workbook.errors import BadInput
from workbook.nested import flat

SCHEMA_VERSION = 2

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


class Session(Part):
    """Where one session's samples come from.

    `visit` tells hosts and their boots apart without naming them; `dirty` is whether the checkout had uncommitted changes; `mark` is random, since cards
    of one host may end their sessions in the same second (empty of goldens from before there was one).
    """
    finished: str
    visit: str
    commit: str
    dirty: bool
    mark: str = ""


class Blessing(Part):
    """Who made this the golden, when and why, and the SHA-256 of the file that it replaced."""
    by: str
    when: str
    reason: str
    supersedes: str | None = None


class Anchor(Part):
    """The first golden of this key, from which drift over many blessings is counted: its medians by metric."""
    recorded: str
    blessed: str
    medians: dict[str, float]


class Blessed(Part):
    """One link of the chain of goldens of this key: when it was blessed, why, and the means of its gated metrics."""
    when: str
    by: str
    reason: str
    means: dict[str, float]


class Golden(Part):
    """A baseline: key, subject, soft environment, controls, samples, correctness and sequences.

    A candidate is the same before it is blessed: without blessing, anchor and history, and perhaps with problems.
    """
    schema_version: Literal[2] = SCHEMA_VERSION
    run: str
    key: Key
    work: dict[str, Any] | None = None
    """What was asked (`params.Exam.work`), of which `key` has the hash; goldens from before do not say."""
    subject: dict[str, Any]
    environment: dict[str, Any]
    controls: dict[str, list[list[float]]]
    metrics: dict[str, Samples]
    correct: list[list[bool]] | None
    scorer: str | None = None
    """What said so: the first of the exam's scorers; goldens from before do not say."""
    sequences: list[Sequence]
    sessions: list[Session]
    requests: dict[str, list[list[float]]] = {}
    """Quantiles of the requests of each session, as `distributions.quantiles`; goldens from before have none."""
    rates: dict[str, tuple[int, int]] = {}
    """Answers (of `identical`: questions) with each sign of `degeneration`, and of how many, over all sessions."""
    signs: dict[str, list[int]] = {}
    """The same counts by question."""
    stated: list[list[str]] | None = None
    """The final answers that were stated (`answers.label`), by question and sample, as `correct`."""
    lengths: list[list[int]] | None = None
    """Output tokens of each answer, likewise."""
    self_drift: list[float] = []
    """How far each later session read the sequences from the first one: `drift.Drift.p99`."""
    parted: tuple[int, int] | None = None
    """Greedy answers of the sessions that parted from the sequences, and tokens read until then: `drift.parted`."""
    blessing: Blessing | None = None
    anchor: Anchor | None = None
    history: list[Blessed] = []
    problems: list[str] = []

    @property
    def recorded(self) -> list[str]:
        """When each session ended."""
        return [session.finished for session in self.sessions]


def path_of(platform: str, run: str) -> Path:
    """File of a golden."""
    return paths.goldens() / platform / f"{run}.json"


def read(path: Path) -> Golden:
    """Read and check a golden.

    Raises:
        BadInput: the file is missing, cut off or not a golden of this version.
    """
    values = files.read_json(path)
    if not isinstance(values, dict) or values.get("schema_version") != SCHEMA_VERSION:
        if not isinstance(values, dict):
            raise BadInput(f"{path}: holds a {type(values).__name__}; expected a golden, which is a mapping")
        found = values.get("schema_version")
        raise BadInput(f"{path}: key 'schema_version' is {found!r}; expected {SCHEMA_VERSION}"
                       + (", so record and bless it again" if isinstance(found, int) and found < SCHEMA_VERSION else ""))
    try:
        found = Golden(**values)
    except ValidationError as error:
        raise BadInput(f"{path}: {first_error(error)}; expected a complete golden") from None
    if problem := _contradiction(found):
        raise BadInput(f"{path}: {problem}; expected a golden as it was written (git log has it), and no merge of two")
    return found


def _contradiction(golden: Golden) -> str:
    """What in a golden does not fit the rest of it, in a sentence: it was edited, or merged of two; empty if all does."""
    by_question = {name: len(rows) for name, rows in (("correct", golden.correct), ("stated", golden.stated), ("lengths", golden.lengths)) if rows is not None}
    by_question |= {f"signs.{name}": len(counts) for name, counts in golden.signs.items()}
    if len(set(by_question.values())) > 1:
        return f"its keys are of different numbers of questions: {', '.join(f'{name} of {count}' for name, count in by_question.items())}"
    for name in ("correct", "stated", "lengths"):
        rows = getattr(golden, name)
        if rows is not None and (not rows or len({len(row) for row in rows}) > 1 or not rows[0]):
            return f"key '{name}' has {'no questions' if not rows else 'questions of different numbers of samples'}"
    for name, samples in golden.metrics.items():
        if not samples.sessions or not all(samples.sessions):
            return f"key 'metrics.{name}.sessions' has a session without samples, or none"
        if samples.direction not in ("higher", "lower"):
            return f"key 'metrics.{name}.direction' is {samples.direction!r}; higher or lower"
    for name, sessions in golden.controls.items():
        if not sessions or not all(session and all(time > 0 for time in session) for session in sessions):
            return f"key 'controls.{name}' has a session without times, or a time that is not positive"
    for number, sequence in enumerate(golden.sequences):
        if len(sequence.logprobs) != len(sequence.token_ids):
            return f"key 'sequences.{number}' has {len(sequence.logprobs)} log-probabilities of {len(sequence.token_ids)} tokens"
    if wrong := [name for name, (_, whole) in golden.rates.items() if whole < 1]:
        return f"key 'rates.{wrong[0]}' is of no answers"
    return ""


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong with a file: the key and what about it."""
    first = error.errors()[0]
    return f"key '{'.'.join(map(str, first['loc']))}': {first['msg']}"


def find(run: str, key: Key, work: dict[str, Any] | None = None) -> tuple[Golden | None, str]:
    """The golden for this run, work and platform, or None with a sentence that says why there is none, and of a given work in which keys it is another.

    Raises:
        BadInput: there is one that cannot be read, was never blessed, or is another run's.
    """
    path = path_of(key.platform, run)
    if not path.exists():
        others = sorted(p.parent.name for p in paths.goldens().glob(f"*/{run}.json"))
        nearest = difflib.get_close_matches(key.platform, others, n=1, cutoff=0.0)
        known = f"the nearest with one is '{nearest[0]}'" if nearest else "no platform has one"
        return None, f"no golden of '{run}' for '{key.platform}'; {known}; make record RUN={run} and then make bless RUN={run} REASON=\"...\" give it one"
    golden = read(path)
    if golden.run != run:
        raise BadInput(f"{path}: key 'run' is '{golden.run}'; expected '{run}'")
    if golden.blessing is None:
        raise BadInput(f"{path}: key 'blessing' is null; expected a golden that was blessed (make bless)")
    if golden.key.platform != key.platform:
        return None, f"the golden of '{run}' kept for '{key.platform}' was recorded on '{golden.key.platform}'"
    if golden.key.work != key.work:
        return None, f"the golden of '{run}' for '{key.platform}' was recorded with other parameters, by commit {golden.sessions[0].commit[:7]}{exams.apart(work, golden.work, 'for the golden')}"
    if not same_work(golden.key, key):
        return None, f"the golden of '{run}' for '{key.platform}' was recorded with other prompts"
    return golden, ""


def require_folder() -> None:
    """Refuse a `GOLDBOOK_GOLDENS` that is no folder: by a slip of the pen every run would be NO_GOLDEN and none would fail. Raises BadInput."""
    if os.environ.get("GOLDBOOK_GOLDENS") and not paths.goldens().is_dir():
        raise BadInput(f"{paths.goldens()}: no such folder; expected GOLDBOOK_GOLDENS to name the one with the goldens, an empty one if there are none yet")


def require_readable(exam: params.Exam) -> None:
    """Refuse a golden that the run would be held against and that `find` cannot take, before an engine starts. Raises BadInput as it does."""
    find(exam.run, Key(platform=platforms.platform_id(exam), work=exam.work_hash(), prompts=""))


def same_work(golden: Key, key: Key) -> bool:
    """Whether a golden's key is that of a run; one that was imported does not know the prompts."""
    return golden.model_copy(update={"prompts": golden.prompts or key.prompts}) == key


def same_scorer(golden: "Golden", scorer: str | None) -> bool:
    """Whether a golden's correctness is that of the same scorer, as far as it says."""
    return golden.scorer is None or scorer is None or golden.scorer == scorer


def key_of(record: dict[str, Any]) -> Key:
    """Key of a run from its `run.json`."""
    return Key(work=record["work_sha256"], prompts=record["prompts_sha256"], platform=record["machine"]["platform"])


def session_of(record: dict[str, Any], by_repetition: pd.DataFrame, scores: pd.DataFrame | None, sequences: list[dict],
               requests: pd.DataFrame | None = None, parted: tuple[int, int] | None = None) -> Golden:
    """A golden made of one session, to be merged with others.

    Args:
        record: the session's `run.json`.
        by_repetition: a row per repetition, a column per metric.
        scores: rows of `scores.parquet` with prompt_id, sample and, as far as there are any, correct, stated and signs;
            None where nothing was judged.
        sequences: golden token sequences with their log-probabilities.
        requests: rows of `requests.parquet`, of which the distributions are kept, and the lengths of the judged answers.
        parted: what `drift.parted` found, where the sequences are not the session's own answers.
    """
    judged = pd.DataFrame(columns=["prompt_id", "sample"]) if scores is None else scores
    exam = params.Exam(**record["params"])
    tallies = degeneration.tally(exam, judged)
    found = {name: metrics.sessions(by_repetition, name) for name in by_repetition}
    samples = {name: Samples(unit=metrics.kind(name).unit, direction=metrics.kind(name).direction, sessions=[[rounded(v) for v in s] for s in values])
               for name, values in found.items() if np.isfinite(np.concatenate(values)).all()}
    return Golden(
        run=record["params"]["run"], key=key_of(record), work=exam.work, subject=record["subject"], environment=record["machine"],
        controls={name: [[rounded(v) for v in values]] for name, values in record["controls"].items()},
        metrics=samples, correct=correctness(scores).tolist() if "correct" in judged else None,
        scorer=next(iter(record["params"].get("scorers", [])), None) if "correct" in judged else None,
        rates={name: (t.count, t.of) for name, t in tallies.items()}, signs={name: t.questions for name, t in tallies.items()},
        stated=by_question(scores, "stated").tolist() if "stated" in judged else None,
        lengths=by_question(answers_of(requests), "output_tokens").tolist() if exam.free_to_stop and scores is not None and requests is not None else None, parted=parted,
        sequences=[Sequence(**s | {"logprobs": [round(x, 5) for x in s["logprobs"]]}) for s in sequences],
        requests={} if requests is None else {name: [[rounded(v) for v in values]] for name, values in distributions.quantiles(requests).items()},
        sessions=[Session(finished=record["finished"], visit=record["machine"]["visit"], commit=record["machine"]["git"]["commit"], dirty=record["machine"]["git"]["dirty"],
                          mark=record.get("mark", ""))])


def merge(first: Golden, *others: Golden) -> Golden:
    """Sessions of the same work on the same platform and subject, pooled; answers and sequences are the first's, and how
    far the others' readings of these are from the first one's is kept.

    A metric that one of the sessions lacks is left out: its samples would not be those of all sessions.

    Raises:
        BadInput: the sessions are not comparable.
    """
    for other in others:
        if found := unlike(first, other.key, other.subject):
            raise BadInput(f"sessions of '{first.run}' differ in what was run: {'; '.join(found)}; expected sessions of one key and subject")
    merged = first.model_copy(deep=True)
    merged.metrics = {name: samples for name, samples in merged.metrics.items() if all(name in other.metrics for other in others)}
    for other in others:
        for name, samples in merged.metrics.items():
            samples.sessions += other.metrics[name].sessions
        for name, sessions in merged.controls.items():
            sessions += other.controls[name]
        for name, sessions in merged.requests.items():
            sessions += other.requests.get(name, [])
        merged.sessions += other.sessions
        if other.rates:
            merged.rates = {name: (count + other.rates[name][0], of + other.rates[name][1]) for name, (count, of) in merged.rates.items() if name in other.rates}
            merged.signs = {name: [a + b for a, b in zip(merged.signs[name], other.signs[name], strict=True)] for name in merged.rates}
        merged.self_drift += other.self_drift
        if other.sequences and drift.same(merged.sequences, other.sequences):
            merged.self_drift.append(rounded(drift.compare([s.logprobs for s in merged.sequences], [s.logprobs for s in other.sequences]).p99))
        if other.parted:
            merged.parted = tuple(map(sum, zip(merged.parted or (0, 0), other.parted)))
    return merged


def unlike(golden: Golden, key: Key, subject: dict[str, Any]) -> list[str]:
    """What sets another key and subject apart, a phrase each; the parts of the subject that are not given are not
    compared, and two commits between which the code did not change are one."""
    found = [f"{name} is {now!r} and not {before!r}" for name, before in golden.key.model_dump().items() if (now := getattr(key, name)) != before]
    before = flat({name: golden.subject.get(name) for name in subject})
    after = flat(subject)
    return found + [f"{name} is {after.get(name)!r} and not {before.get(name)!r}" for name in sorted(before | after)
                    if before.get(name) != after.get(name) and not (name == "commit" and platforms.same_code(before.get(name), after.get(name)))]


def write(path: Path, golden: Golden) -> None:
    """Write a golden in one step; the same golden always gives the same bytes.

    Raises:
        BadInput: it is not one that could be read again.
    """
    values = golden.model_dump(mode="json")
    try:
        Golden.model_validate(values)
    except ValidationError as error:
        raise BadInput(f"{path}: not written: {first_error(error)}; expected a complete golden") from None
    files.write_json(path, values)


def mean(sessions: Iterable[list[float]]) -> float:
    """The mean that the verdict's rule compares: of the logs, over the sessions' means, as a value of the metric."""
    return float(np.exp(np.mean([np.mean(np.log(samples)) for samples in sessions])))


def correctness(scores: pd.DataFrame) -> np.ndarray:
    """Right or wrong as an array (questions, samples) of booleans."""
    return by_question(scores, "correct").astype(bool)


def by_question(rows: pd.DataFrame, column: str) -> np.ndarray:
    """A column as an array (questions, samples), in the order of prompt_id and sample."""
    return rows.pivot(index="prompt_id", columns="sample", values=column).to_numpy()


def answers_of(requests: pd.DataFrame) -> pd.DataFrame:
    """The requests whose answers are judged: a session's first pass, in a sweep that of the last point, where every
    question is asked."""
    rows = requests[requests.point == requests.point.max()]
    return rows[(rows.session == rows.session.min()) & (rows.repetition == rows.repetition.min())]


def rounded(value: float, digits: int = 6) -> float:
    """So many significant digits: six are more than any clock gives, and make a git diff that can be read."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value
