"""Candidates: recorded sessions that may become a golden, what speaks against one, and the blessing."""
import datetime
import hashlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from scipy import stats

from workbook import accuracy, controls, drift, exams, goldens, machine, metrics, paths, quality, results, runs, verdicts
from workbook.errors import BadInput
from workbook.goldens import Anchor, Blessed, Blessing, Golden
from workbook.params import Exam, Gate, nearest

SESSIONS, REPETITIONS = 3, 5
"""The least that a golden is made of: engine sessions, and repetitions in each."""
TREND_P, TREND_SHARE = 0.01, 0.4
"""A trend is one that noise explains with less than this probability, and that moves a session by more than this share
of the gate's delta: 2 % at the default of 5 %. What a gate would not notice is no reason to record again."""
MANY, HEADROOM = 12, 1.3
"""More sessions are worth the advice if so many would do. A delta is advised with headroom: one that is just visible leaves half
of the runs without a change in doubt at their first look."""
LOCK_TIMEOUT_S = 60


class Change(NamedTuple):
    """What blessing a candidate changes about one metric: a line of the table that `bless` prints.

    Attributes:
        old: mean of the golden that is replaced, None where there is none to compare with.
        shift, low, high: change against it and its interval, per cent of the metric.
        drift: change of the median since the anchor, per cent.
    """
    metric: str
    new: float
    old: float | None = None
    shift: float | None = None
    low: float | None = None
    high: float | None = None
    status: str = ""
    drift: float | None = None


def path_of(run: str) -> Path:
    """File of a candidate: recorded, not yet blessed."""
    return paths.reports() / "candidates" / f"{run}.json"


def keep(path: Path) -> None:
    """Copy a golden or candidate that is about to be replaced to `reports/history/goldens/`."""
    if path.exists():
        name = f"{path.stem}-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S.%fZ}.json"
        place = paths.reports() / "history" / "goldens" / path.parent.name / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place)


def watched(exam: Exam, candidate: Golden) -> dict[str, Gate]:
    """The metrics that a golden stands for, and how much worse each may get: the gated ones, and the headline where it is
    none of them. A band knows no noise; what it gates is held to a gate's defaults."""
    head = metrics.headline(candidate.metrics)
    return ({head: Gate()} if head else {}) | {name: Gate() if gate.rule == "band" else gate for name, gate in exam.gates.items()}


def shortage(candidate: Golden) -> list[str]:
    """What a candidate still lacks and more sessions can give it, a sentence each."""
    found, sizes = [], repetitions(candidate)
    if (have := len(candidate.sessions)) < SESSIONS:
        exam = exams.load(candidate.run)
        noisy = [said for name in exam.gates if name in candidate.metrics and (said := _noise(name, candidate.metrics[name].sessions, exam))]
        found.append(f"{have} session{'' if have == 1 else 's'}; expected at least {SESSIONS} (make record RUN={candidate.run} ADD=1 adds some)" + "".join(f"; so far {said}" for said in noisy))
    if sizes and min(sizes) < REPETITIONS:
        found.append(f"a session of {min(sizes)} repetitions; expected at least {REPETITIONS} in each")
    return found


def repetitions(candidate: Golden) -> list[int]:
    """Repetitions of each session: the samples of the metric that has most of them."""
    return [max(map(len, samples)) for samples in zip(*(metric.sessions for metric in candidate.metrics.values()))]


def problems(candidate: Golden, exam: Exam) -> list[str]:
    """Why a candidate must not become the golden of an exam, a sentence each, apart from a shortage."""
    found = [f"session {n} was recorded on a checkout with uncommitted changes; expected a clean one" for n, s in enumerate(candidate.sessions, 1) if s.dirty]
    for n in range(len(candidate.sessions)):
        taken = [x for name, m in candidate.metrics.items() if name.partition("@")[0] == metrics.OTHERS and n < len(m.sessions) for x in m.sessions[n]]
        if taken and np.mean(taken) > controls.OTHERS_PCT:
            found.append(f"session {n + 1} was recorded while other processes took {np.mean(taken):.0f} % of the cores; expected at most {controls.OTHERS_PCT} %")
    if candidate.run != exam.run:
        found.append(f"it was recorded for run '{candidate.run}'; expected '{exam.run}'")
    if candidate.key.work != exam.work_hash():
        found.append(f"it was recorded with other parameters than {_file(exam)} has now; expected the work it was recorded with, or a new recording{exams.apart(exam.work, candidate.work, 'in what was recorded')}")
    if (noise := max(candidate.self_drift, default=0.0)) > drift.NOISIEST:
        found.append(f"its sessions read the same answers of the same weights {noise:.2g} nats apart; expected at most {drift.NOISIEST}, for {drift.NOISE} times as much would pass as no drift")
    found += [f"unknown metric '{name}'{nearest(name, list(metrics.METRICS))}" for name in candidate.metrics if name.partition("@")[0] not in metrics.METRICS]
    found += [f"{name} is gated and was not measured in every session; expected samples of it" for name in exam.gates if name not in candidate.metrics]
    for name in (n for n in watched(exam, candidate) if n in candidate.metrics):
        sessions = candidate.metrics[name].sessions
        if len(sessions) != len(candidate.sessions) or not all(sessions):
            found.append(f"{name} has samples of {sum(map(bool, sessions))} sessions; expected {len(candidate.sessions)}")
        elif not all(value > 0 for samples in sessions for value in samples):
            found.append(f"{name} has a sample that is not a positive number; expected none, since speeds are compared in logs")
        else:
            found += [sentence for sentence in (_trend(name, sessions, exam), _noise(name, sessions, exam) if len(sessions) >= SESSIONS else "") if sentence]
    return found


def _file(exam: Exam) -> str:
    """Where the exam's parameters are, for a sentence."""
    name, _, variant = exam.run.partition("@")
    return f"params/{name}.yaml" + (f" (variant {variant})" if variant else "")


def trend(sessions: list[list[float]]) -> tuple[float, float]:
    """Whether samples rise or fall with their order within a session.

    The logs less their session's mean, against the repetition's number less its mean: a straight line by least
    squares through all sessions, with a slope in common and a level of each one's own (analysis of covariance).

    Returns:
        The change over the longest session as a fraction, and the probability of such a slope without a trend
        (two-sided); (0, 1) where there are too few samples to tell.
    """
    longest, count = max(map(len, sessions)), sum(map(len, sessions))
    freedom = count - len(sessions) - 1
    if longest < 2 or freedom < 1:
        return 0.0, 1.0
    order = np.concatenate([np.arange(len(s)) - (len(s) - 1) / 2 for s in sessions])
    values = np.concatenate([np.log(s) - np.mean(np.log(s)) for s in sessions])
    if np.allclose(values, 0):
        return 0.0, 1.0
    line = stats.linregress(order, values)
    # linregress counts two parameters; here every session's level is one.
    error = max(line.stderr * math.sqrt((count - 2) / freedom), 1e-12)
    return math.expm1(line.slope * (longest - 1)), float(2 * stats.t.sf(abs(line.slope) / error, freedom))


def _trend(name: str, sessions: list[list[float]], exam: Exam) -> str:
    (change, p), limit = trend(sessions), TREND_SHARE * exam.gates.get(name, Gate()).delta
    if p >= TREND_P or abs(change) <= limit:
        return ""
    return (f"{name} moves by {change * 100:+.1f} % in the course of a session (p = {p:.2g}); expected a trend of at most {limit * 100:.1f} %: "
            f"a longer warm-up, or a machine that keeps its speed")


def _noise(name: str, sessions: list[list[float]], exam: Exam) -> str:
    """What is wrong with a gate's delta, for sessions like these, `SESSIONS` of them or more; empty where nothing is. Still more of
    them are advised only where they would do."""
    gate, count = exam.gates.get(name), min([exam.repetitions, *map(len, sessions)])  # a run has as many as the exam, fewer than a recording
    if not gate or gate.rule == "band" or not all(value > 0 for samples in sessions for value in samples) or not all(sessions):
        return ""  # what was not measured, or has no log, is told elsewhere
    seen, with_many = (verdicts.visible((sessions * least)[:max(least, len(sessions))], count, results.prior_sd(name)) for least in (SESSIONS, MANY))
    if seen <= gate.delta:
        return ""
    more = "more sessions (ADD=1), " if with_many <= gate.delta else ""
    return (f"{name}: the smallest loss that a new session of {count} repetition{'' if count == 1 else 's'} would show is {seen * 100:.1f} %"
            f"{'' if more else f' ({with_many * 100:.1f} % with {MANY} such sessions in the golden)'}, above the gate's delta of {gate.delta * 100:.1f} %; "
            f"expected {more}a quieter machine, or a delta of {math.ceil(seen * HEADROOM * 100) / 100:g} in {_file(exam)}")


def changes(candidate: Golden, golden: Golden | None, anchor: Anchor | None, gates: dict[str, Gate]) -> list[Change]:
    """Old and new of each metric, judged as a run is judged, with its gate's delta and margin, but for the controls: a
    loss that the machine may have caused lowers the bar too, once it is in the golden. Where the candidate has
    sessions of the golden's own, it is the others that are judged.

    Args:
        golden: what is replaced; None where nothing comparable is.
        gates: of each metric that is watched (`watched`).
    """
    found, added = [], _added(candidate, golden)
    for name, gate in gates.items():
        new = candidate.metrics[name]
        change = Change(name, goldens.mean(new.sessions))
        if anchor and anchor.medians.get(name, 0) > 0:
            change = change._replace(drift=100 * (_median(new.sessions) / anchor.medians[name] - 1))
        if golden and name in golden.metrics and all(value > 0 for samples in golden.metrics[name].sessions for value in samples):  # compared in logs
            verdict = verdicts.judge(golden.metrics[name].sessions, [new.sessions[i] for i in added], direction=new.direction, delta=gate.delta, margin=gate.margin,
                                     prior_sd=results.prior_sd(name))
            shift, *ends = (verdicts.change(x, new.direction) * 100 for x in (verdict.effect, verdict.low, verdict.high))
            change = change._replace(old=goldens.mean(golden.metrics[name].sessions), shift=shift, low=min(ends), high=max(ends), status=verdict.status)
        found.append(change)
    return found


def _added(candidate: Golden, golden: Golden | None) -> list[int]:
    """Which of the candidate's sessions are not the golden's own; all of them where it has none else."""
    every = range(len(candidate.sessions))
    return [i for i in every if not golden or candidate.sessions[i] not in golden.sessions] or list(every)


def _grown(candidate: Golden, golden: Golden) -> bool:
    """Whether the candidate has sessions of the golden's own."""
    return len(_added(candidate, golden)) < len(candidate.sessions)


def table(found: list[Change], anchor: Anchor | None) -> str:
    """The changes as text for a terminal."""
    rows = [("metric", "old", "new", "change", "interval", "", f"since {anchor.blessed[:10]}" if anchor else "")]
    for c in found:
        rows.append((c.metric, metrics.number(c.old), metrics.number(c.new), _percent(c.shift), "" if c.low is None else f"{_percent(c.low)} to {_percent(c.high)}",
                     c.status, _percent(c.drift)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i in (0, 5) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows)


def bless(run: str, reason: str, by: str, *, accept_regression: bool = False, tell: Callable[[str], None] = print) -> Path:
    """Make the candidate of a run the golden of its platform; one at a time, over all processes.

    Args:
        accept_regression: make it so although it is worse, lacks sessions that were added to the golden since, or
            what it replaces cannot be read.
        tell: is told old and new, before anything is decided.

    Raises:
        BadInput: no reason, no candidate, one with problems, or a loss that is not accepted.
    """
    if not reason.strip():
        raise BadInput("REASON is empty; expected a sentence that says why this becomes the golden")
    exam, path = exams.load(run), path_of(run)
    if not path.exists():
        raise BadInput(f"{path}: no candidate; expected `make record RUN={run}` first")
    try:
        paths.goldens().mkdir(parents=True, exist_ok=True)
        with FileLock(paths.goldens() / ".lock", timeout=LOCK_TIMEOUT_S):
            candidate = goldens.read(path)
            if found := shortage(candidate) + problems(candidate, exam):
                raise BadInput(f"{path}: cannot be blessed: {'; '.join(found)}")
            return _replace(candidate, exam, " ".join(reason.split()), by, accept_regression, tell)
    except Timeout:
        raise BadInput(f"{paths.goldens()}: another bless has been at work for {LOCK_TIMEOUT_S} s; expected it to end") from None
    except OSError as error:
        raise BadInput(f"{paths.goldens()}: cannot be written ({error.strerror}); expected a writable folder, GOLDBOOK_GOLDENS names another") from None


def _replace(candidate: Golden, exam: Exam, reason: str, by: str, accept: bool, tell: Callable[[str], None]) -> Path:
    place = goldens.path_of(candidate.key.platform, candidate.run)
    golden, unread = present(place)
    comparable = golden if golden and goldens.same_work(golden.key, candidate.key) else None
    gates, anchor = watched(exam, candidate), comparable and comparable.anchor
    found = changes(candidate, comparable, anchor, gates)
    right, worse = _accuracy(candidate, comparable, exam), _worse_answers(candidate, comparable)
    tell("\n".join(_report(candidate, golden, comparable, unread, gates) + [table(found, anchor)] + ([right.sentence] if right else []) + worse))
    losses = [f"{c.metric} {_percent(c.shift)}" for c in found if c.status == "REGRESSED"]
    losses += [f"accuracy {right.sentence}"] if right and right.status == "REGRESSED" else []
    losses += worse
    losses += _lost(candidate, comparable)
    losses += [f"the golden there cannot be read, so a loss would not show ({unread})"] if unread else []
    if losses and not accept:
        raise BadInput(f"run '{candidate.run}' is not blessed: {'; '.join(losses)}; expected no loss, or ACCEPT_REGRESSION=1 where it is meant to stay")
    when = runs.now()
    means = {c.metric: goldens.rounded(c.new) for c in found}
    candidate.blessing = Blessing(by=by, when=when, reason=reason, supersedes=hashlib.sha256(place.read_bytes()).hexdigest() if place.exists() else None)
    candidate.anchor = anchor or Anchor(recorded=candidate.recorded[0], blessed=when,
                                        medians={name: goldens.rounded(_median(m.sessions)) for name, m in candidate.metrics.items()})
    candidate.history = [*(comparable.history if comparable else []), Blessed(when=when, by=by, reason=reason, means=means)]
    candidate.problems = []
    keep(place)
    goldens.write(place, candidate)
    return place


def present(place: Path) -> tuple[Golden | None, str]:
    """The golden at a place, and what is wrong with it if it cannot be read."""
    try:
        return (goldens.read(place) if place.exists() else None), ""
    except BadInput as error:
        return None, str(error)


def _lost(candidate: Golden, golden: Golden | None) -> list[str]:
    """A sentence where the candidate was made by adding sessions to an older golden than the one it would replace."""
    shared = sum(s in candidate.sessions for s in golden.sessions) if golden else 0
    if not shared or shared == len(golden.sessions):
        return []
    return [f"{len(golden.sessions) - shared} of the golden's {len(golden.sessions)} sessions are not in the candidate, which has the other {shared}: it was made from an older "
            f"golden (move it away, and record its other sessions anew with ADD=1)"]


def _accuracy(candidate: Golden, golden: Golden | None, exam: Exam) -> accuracy.Drop | None:
    """Whether accuracy fell, as a run's is judged; None where it is not known: of a golden that grew the answers are those of its first session."""
    if golden and _grown(candidate, golden) or not (golden and golden.correct and candidate.correct and goldens.same_scorer(golden, candidate.scorer)):
        return None
    return accuracy.compare(np.array(golden.correct, dtype=bool), np.array(candidate.correct, dtype=bool), sampled=exam.temperature > 0)


def worse(session: Golden, candidate: Golden, exam: Exam) -> list[str]:
    """In what the answers of a new session are worse than those of a candidate that it would be added to, a sentence each: the
    candidate keeps those of its first session, so nobody would see it later."""
    right = _accuracy(session, candidate, exam)
    return ([f"accuracy {right.sentence}"] if right and right.status == "REGRESSED" else []) + _worse_answers(session, candidate)


def _worse_answers(candidate: Golden, golden: Golden | None) -> list[str]:
    """Rates of degeneration that rose in the sessions that are not the golden's own, and lengths that moved, a sentence each."""
    rates = quality.tallies(candidate)
    grown = golden and _grown(candidate, golden)
    if grown and not _lost(candidate, golden):
        before = quality.tallies(golden)
        rates = {name: tally.without(before[name]) for name, tally in rates.items() if name in before}
    lengths = candidate.lengths and not grown and quality.judge_lengths(np.array(candidate.lengths), golden)
    return [found["sentence"] for found in (quality.judge_rates(rates, golden), lengths) if found and found["status"] == "REGRESSED"]


def _report(candidate: Golden, golden: Golden | None, comparable: Golden | None, unread: str, gates: dict[str, Gate]) -> list[str]:
    """What is replaced by what, in lines above the table."""
    old = _sessions(golden) + f', blessed {golden.blessing.when[:10]}: "{golden.blessing.reason}"' if golden and golden.blessing else unread or "none"
    lines = [f"{candidate.run} on {candidate.key.platform}", f"old: {old}", f"new: {_sessions(candidate)}"]
    if golden and not comparable:
        lines.append("the old one was recorded with other parameters or prompts: the two do not compare, and drift is counted from the new one")
    added = _added(candidate, comparable)
    if comparable and (shared := len(candidate.sessions) - len(added)):
        lines.append(f"{shared} of the new sessions are the old ones; the change is that of the {len(added)} added to them, and right answers and lengths stay those of the first")
    if comparable:
        moved = machine.judge(comparable, *({name: sessions[i] for name, sessions in candidate.controls.items()} for i in added),
                              samples={name: [samples.sessions[i] for i in added] for name, samples in candidate.metrics.items()}, judged=gates)
        lines += [] if moved["comparable"] else [moved["sentence"]]
    if len({(s.visit, s.finished[:10]) for s in candidate.sessions}) == 1:
        lines.append("all new sessions are of one visit; sessions of another day or host (ADD=1) would show how much those differ")
    return lines


def _sessions(golden: Golden) -> str:
    days = sorted({when[:10] for when in golden.recorded})
    return f"{len(golden.sessions)} sessions of {', '.join(days)}"


def _median(sessions: list[list[float]]) -> float:
    return float(np.median(np.concatenate(sessions)))


def _percent(value: float | None) -> str:
    # Plus 0.0: no change is +0.0 and not -0.0.
    return "" if value is None else f"{round(value, 1) + 0.0:+.1f} %"
