"""An A/B as it lies in the reports: its visits, the verdict on their pairs, and its `result.json`."""
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from workbook import controls, files, goldens, metrics, nested, params, paths, quality, sessions, verdicts
from workbook.errors import BadInput
from workbook.params import Exam
from workbook.runs import now
from workbook.scraps import plain
from workbook.statuses import overall
from workbook.verdicts import Verdict

SCHEMA_VERSION = 1
PLAN, OUTCOME = "ab.json", "visit.json"
"""What an A/B writes first: pairs, parameters, interpreters; and what a visit writes last: `problem`, empty if its
notebook got to its end, and `worthless`, why its answers are worth nothing."""
DELTA, MARGIN = 0.03, 0.02
"""The loss that is to be ruled out, and the one up to which a difference is not called one."""
LENGTH_ALPHA = 0.001
"""The p below which a visit's answers are of another length than the first one's: of sixteen visits fifteen are asked."""
SPEEDS = ("tok/s", "requests/s", "ms", "s")
"""Units of which "slower" and "faster" can be said."""


@dataclass(frozen=True)
class Visit:
    """One session of one variant.

    Attributes:
        name: `<nn>-<variant>`, numbered in the order in which the visits were made.
        problem: why it is not valid, in a sentence; empty if it is.
        record: its `run.json`; empty if generate.ipynb did not get that far.
        metrics: of each repetition, as `metrics.by_repetition`; empty likewise.
        lengths: output tokens of the first pass by question and sample; None where the exam sets them, or an answer is missing.
    """
    name: str
    problem: str
    record: dict[str, Any]
    metrics: pd.DataFrame
    lengths: np.ndarray | None = field(default=None, compare=False)

    @property
    def variant(self) -> str:
        """`a` or `b`."""
        return self.name[-1]

    def samples(self, name: str) -> list[float]:
        """A metric's samples; empty if it was not measured."""
        return next(iter(metrics.sessions(self.metrics, name)), [])


@dataclass(frozen=True)
class Experiment:
    """An A/B: what was planned, and the visits that were made.

    Attributes:
        pairs: planned.
        started: time of day.
        variants: of `a` and of `b`: `set`, `python` and `params`.
    """
    run: str
    pairs: int
    started: str
    variants: dict[str, dict[str, Any]]
    visits: list[Visit]

    @property
    def exam(self) -> Exam:
        """A's exam: B's is the same but for what is under test."""
        return params.check(self.variants["a"]["params"], PLAN)

    @property
    def judged(self) -> list[str]:
        """The metrics that are judged: the gated ones, or the throughput where none is gated."""
        return list(self.exam.gates) or [name for name in [metrics.headline(self.measured)] if name]

    @property
    def measured(self) -> list[str]:
        """Every metric that a visit has."""
        return list(dict.fromkeys(name for visit in self.visits for name in visit.metrics))

    @property
    def problems(self) -> list[str]:
        """Why there is no verdict, a sentence each."""
        found = [f"visit {v.name}: {v.problem}" for v in self.visits if v.problem]
        missing = 2 * self.pairs - len(self.visits)
        return found or ([f"{missing} of {2 * self.pairs} visits are missing"] if missing else [])

    def samples(self, name: str) -> tuple[list[list[float]], list[list[float]]]:
        """A metric's samples by pair, A's and B's: of the pairs whose two visits have it."""
        found = [v.samples(name) for v in self.visits]
        whole = [i for i in range(0, len(self.visits) - 1, 2) if found[i] and found[i + 1]]
        a, b = ([found[i] if self.visits[i].variant == side else found[i + 1] for i in whole] for side in "ab")
        return a, b


def order(pairs: int) -> list[str]:
    """Names of the visits in the order in which they are made: A B, B A, A B, ... (ABBA)."""
    return [f"{number:02}-{side}" for number, side in enumerate(("abba" * pairs)[:2 * pairs], start=1)]


def read(run: str) -> Experiment:
    """The latest A/B of a run.

    Raises:
        BadInput: there is none.
    """
    folder = paths.ab_folder(run)
    if not (folder / PLAN).exists():
        raise BadInput(f"run '{run}' has no A/B in {folder}; expected make ab RUN={run} A=... B=... first")
    plan = files.read_json(folder / PLAN)
    visits = read_visits(folder, order(plan["pairs"]), run)
    return Experiment(run, plan["pairs"], plan["started"], plan["variants"], visits)


def read_visits(folder: Path, names: list[str], run: str) -> list[Visit]:
    """The visits of an experiment's folder that were made, in the order of their names."""
    visits: list[Visit] = []
    for name in names:
        if (folder / "visits" / name / OUTCOME).exists():
            visits.append(read_visit(folder / "visits" / name, run, next((v for v in visits if v.record), None)))
    return visits


def read_visit(folder: Path, run: str, first: Visit | None) -> Visit:
    """A visit from its folder; `first` is the A/B's first one, whose questions this one has to have asked too."""
    outcome = files.read_json(folder / OUTCOME)
    problem, place = outcome["problem"], folder / "runs" / run
    if problem or not (place / "run.json").exists():
        return Visit(folder.name, problem or "left no run.json", {}, pd.DataFrame())
    record = files.read_json(place / "run.json")
    exam = params.check(record["params"], f"{folder.name}/run.json")
    if lost := [name for name in ("requests.parquet", "generations.parquet") if not (place / name).exists()]:
        return Visit(folder.name, f"its {' and '.join(lost)} is not there", {}, pd.DataFrame())
    requests, generations = (pd.read_parquet(place / f"{name}.parquet") for name in ("requests", "generations"))
    measured = sessions.Measured(exam, record, requests)
    problems = list(sessions.check(measured, generations, worthless=outcome.get("worthless", [])).problems)
    if first and first.record and first.record["prompts_sha256"] != record["prompts_sha256"]:
        problems.append(f"its prompts are not those of visit {first.name} (set {record['prompts_sha256'][:12]} and {first.record['prompts_sha256'][:12]}: "
                        "another tokenizer or chat template?), so the speeds do not compare")
    lengths = goldens.by_question(goldens.answers_of(requests), "output_tokens") if exam.free_to_stop and not problems else None
    if first and first.lengths is not None and lengths is not None:
        problems += _other_lengths(first, lengths)
    visit = Visit(folder.name, "", record, measured.by_repetition, lengths)
    problems += [f"{name} is gated and has a sample that is not above 0; expected none, since speeds are compared in logs"
                 for name in exam.gates if any(x <= 0 for x in visit.samples(name))]
    return replace(visit, problem="; ".join(problems))


def _other_lengths(first: Visit, lengths: np.ndarray) -> list[str]:
    """A sentence where the answers are not as long as the first visit's: shorter ones end earlier, and that is no speed."""
    ratio, p, off = quality.compare_lengths(first.lengths, lengths, LENGTH_ALPHA)
    return [f"its answers are {ratio * 100:.0f} % as long as those of visit {first.name} ({lengths.mean():.1f} tokens, {first.lengths.mean():.1f} there; expected {quality.SHORTEST * 100:.0f} % to "
            f"{quality.LONGEST * 100:.0f} %; p = {p:.2g}), so the speeds do not compare; SET=\"ignore_eos=true\" makes all answers as long as max_tokens"] if off else []


def judge(name: str, a: list[list[float]], b: list[list[float]]) -> dict[str, Any]:
    """Verdict on one metric from its samples by pair, with its sentence.

    Returns:
        The fields of a `Verdict`, `p` (of the one-sided paired t test that B is worse) and `sentence`.

    Raises:
        ValueError: as `verdicts.judge_pairs`.
    """
    direction = metrics.kind(name).direction
    verdict = verdicts.judge_pairs(a, b, direction=direction, delta=DELTA, margin=MARGIN)
    # Of pairs that do not differ at all there is no t: NaN.
    p = float(np.nan_to_num(stats.ttest_1samp(verdicts.pair_differences(a, b, direction=direction), 0, alternative="greater").pvalue, nan=1.0))
    return asdict(verdict) | {"p": p, "sentence": f"{estimate(name, verdict)}: {_conclusion(verdict, p)}"}


def estimate(name: str, verdict: Verdict) -> str:
    """Effect and interval in words, as fractions of the speed."""
    worse = verdict.effect > 0
    words = ("slower", "faster", "as fast as") if metrics.kind(name).unit in SPEEDS else ("worse", "better", "no different from")
    by, *bounds = (round(loss(x) * (100 if worse else -100), 1) + 0.0 for x in (verdict.effect, verdict.low, verdict.high))  # + 0.0: no minus before a 0
    said = f"{words[0] if worse else words[1]} than A by {by:.1f} %" if by else f"{words[2]} A"
    return f"B is {said} in {name} ({verdict.confidence * 100:.0f} % interval {min(bounds):+.1f} to {max(bounds):+.1f} %)"


def loss(effect: float) -> float:
    """The fraction of A's speed that B lacks, for an effect in logs; negative where B is faster."""
    return float(-np.expm1(-effect))


def _conclusion(verdict: Verdict, p: float) -> str:
    if verdict.status == "REGRESSED":
        return f"FAIL, more than {MARGIN * 100:.0f} % and more than noise explains (p = {p:.2g})"
    if verdict.status == "INCONCLUSIVE":
        return f"INCONCLUSIVE, a loss of {DELTA * 100:.0f} % is neither shown nor ruled out; more pairs see more"
    return "IMPROVED" if verdict.status == "IMPROVED" else f"PASSED, a loss of {DELTA * 100:.0f} % is ruled out"


def verdict_of(experiment: Experiment, judged: dict[str, dict]) -> tuple[str, str]:
    """Status of the A/B and the sentence that says why: validity first, then the worst of the metrics."""
    if experiment.problems:
        return "INVALID", "; ".join(experiment.problems)
    status = overall([found["status"] for found in judged.values()])
    return status, "; ".join(found["sentence"] for found in judged.values() if found["status"] == status)


def metric_table(experiment: Experiment, judged: dict[str, dict]) -> pd.DataFrame:
    """A row for each metric: medians of all repetitions of A and of B, the change, and the verdict."""
    rows = [(name, metrics.kind(name).unit, metrics.kind(name).direction, *_medians(experiment.visits, lambda v, name=name: v.samples(name)))
            for name in experiment.measured]
    return pd.DataFrame([{"metric": name, "unit": unit, "better": better, "A": a, "B": b, "change %": 100 * (b / a - 1) if a else None,
                          "verdict": judged.get(name, {}).get("status", "reported only")} for name, unit, better, a, b in rows])


def control_table(experiment: Experiment) -> pd.DataFrame:
    """A row for each control: A's and B's median, and how they drifted (`drift`)."""
    visits = [v for v in experiment.visits if v.record]
    rows = []
    for name in visits[0].record["controls"] if visits else ():
        a, b = _medians(visits, lambda v, name=name: v.record["controls"][name])
        rows.append({"control": name.removesuffix("_s"), "A, ms": a * 1e3, "B, ms": b * 1e3, "B against A %": 100 * (b / a - 1), **drift(visits, name)})
    return pd.DataFrame(rows)


def visit_table(visits: list[Visit]) -> pd.DataFrame:
    """A row for each visit in its order: when it ended, the median of each control in ms, by which it is judged, and its problem."""
    return pd.DataFrame([
        {"visit": v.name, "finished": v.record.get("finished"),
         **{f"{name.removesuffix('_s')}, ms": 1e3 * float(np.median(seconds)) for name, seconds in v.record.get("controls", {}).items()},
         "problem": v.problem or "none"} for v in visits])


TESTED = 6
"""Of fewer visits a drift has no test, by which a real one would mostly pass unsaid: its size alone counts."""


def drift(visits: list[Visit], control: str) -> dict[str, float]:
    """`drift %`, by how much the line through the logs of the visits' medians of a control rises from the first visit to the last, and
    its `p`, of no slope (`scipy.stats.linregress`; NaN of fewer than `TESTED` visits): a loop that takes 70 ms or 130 rises by a tenth without cause."""
    medians = [float(np.median(v.record["controls"][control])) for v in visits]
    if len(medians) < 2:
        return {"drift %": 0.0, "p": math.nan}
    line = stats.linregress(range(len(medians)), np.log(medians))
    return {"drift %": 100 * float(np.expm1(line.slope * (len(medians) - 1))), "p": float(line.pvalue) if len(medians) >= TESTED else math.nan}


def drift_notes(drifts: dict[str, dict[str, float]], effect: str) -> list[str]:
    """A sentence for each control, by name, that drifted by more than its tolerance and, where there is a test, at p < .05; `effect` says what follows."""
    sure = {name: found["drift %"] for name, found in drifts.items() if not found["p"] >= 0.05 and abs(np.log1p(found["drift %"] / 100)) > np.log1p(controls.TOLERANCE)}
    return [f"the machine changed while this ran: the fixed work of the {name} took {abs(percent):.0f} % {'longer' if percent > 0 else 'less time'} "
            f"in the last visit than in the first, by the line through all; {effect}" for name, percent in sure.items()]


def notes(experiment: Experiment) -> list[str]:
    """What a reader should know beside the verdict, a sentence each."""
    found = []
    if (repetitions := experiment.exam.repetitions) < 3:
        found.append(f"each visit has {repetitions} repetition{'s' if repetitions > 1 else ''}: a loss of 3 % is found less often than with 3 (SET=\"repetitions=3\")")
    drifts = {row["control"]: row for row in control_table(experiment).to_dict("records")}
    found += drift_notes(drifts, "an even drift cancels in the pairs, a jump does not")
    return found


def differences(experiment: Experiment) -> pd.DataFrame:
    """What is not the same in A and B: parameters, packages, weights, interpreter; a row each with both values."""
    sides = {}
    for side, variant in experiment.variants.items():
        record = next((v.record for v in experiment.visits if v.variant == side and v.record), {})
        seen = {k: record.get("subject", {}).get(k) for k in ("packages", "attention", "weights_sha256")} | {"python": record.get("machine", {}).get("python")}
        sides[side] = nested.flat(variant["params"]) | nested.flat(seen) | {"interpreter": variant["python"]}
    a, b = sides["a"], sides["b"]
    return pd.DataFrame([{"what": key, "A": str(a.get(key, "absent")), "B": str(b.get(key, "absent"))} for key in a | b if a.get(key) != b.get(key)])


def result(experiment: Experiment, status: str, sentence: str, judged: dict[str, dict]) -> dict[str, Any]:
    """What goes into `result.json`."""
    samples = {name: {"unit": metrics.kind(name).unit, "direction": metrics.kind(name).direction,
                      **dict(zip("ab", experiment.samples(name), strict=True))} for name in experiment.measured}
    return plain({
        "schema_version": SCHEMA_VERSION, "run": experiment.run, "title": experiment.exam.title, "status": status, "sentence": sentence,
        "started": experiment.started, "finished": now(), "pairs": experiment.pairs, "variants": experiment.variants, "judged": judged, "metrics": samples,
        "medians": metric_table(experiment, judged).to_dict("records"), "controls": control_table(experiment).to_dict("records"),
        "differences": differences(experiment).to_dict("records"), "notes": notes(experiment),
        "visits": [{"name": v.name, "problem": v.problem, "finished": v.record.get("finished")} for v in experiment.visits]})


def _medians(visits: list[Visit], values) -> tuple[float, float]:
    found = ([x for v in visits if v.variant == side and v.record for x in values(v)] for side in "ab")
    a, b = (float(np.median(side)) if side else float("nan") for side in found)
    return a, b
