"""A tuning as it lies in the reports: the settings of a sweep, their visits, and what they say.

Each setting was visited once a round in a fresh engine, and the untuned run before and after each round. Its throughput at the sweep's largest point is held against
the untuned run's with the rule of the goldens (`verdicts.judge`), session by session.
"""
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from workbook import controls, files, machine, metrics, paired, params, paths, roofline, sweeps, verdicts
from workbook.errors import BadInput
from workbook.paired import Visit
from workbook.params import Exam
from workbook.runs import now
from workbook.scraps import plain
from workbook.sweeps import COMBINED, UNTUNED

SCHEMA_VERSION = 1
PLAN = "tune.json"
"""What a tuning writes first: rounds, and the parameters of each setting. `combined` comes into it after the rounds."""
DELTA, MARGIN, ALPHA = 0.03, 0.02, 0.02
"""As in an A/B: a difference of no more than the margin is not called one."""
SPEED, LATENCY = "output_tok_s", "request_tok_s_p50"
"""What the picture has upwards and to the right: what all requests get together, and what one of them gets."""


@dataclass(frozen=True)
class Against:
    """A setting's headline against the untuned's: the ratio of the means of the logs, the bounds of its interval, the
    interval's confidence, and `verdicts.judge`'s status."""
    ratio: float
    low: float
    high: float
    confidence: float
    status: str

    @property
    def brief(self) -> str:
        """Ratio and interval in a few words."""
        return f"{self.ratio:.2f} times ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Tuning:
    """What was planned, and the visits that were made, in their order.

    Attributes:
        settings: the exam of each, by name; `untuned` is the first.
        members: the settings that `combined` is made of; empty where it was not tried.
        stopped: what ended it before all visits were made; empty if nothing did.
    """
    run: str
    started: str
    rounds: int
    settings: dict[str, Exam]
    members: list[str]
    visits: list[Visit]
    stopped: str = ""

    @property
    def untuned(self) -> Exam:
        """What the settings are held against."""
        return self.settings[UNTUNED]

    @property
    def headline(self) -> str:
        """The metric that decides: the throughput at the sweep's largest point."""
        return metric_at(SPEED, max(self.untuned.points, default=0))

    def of(self, setting: str) -> list[Visit]:
        """The visits of a setting."""
        return [v for v in self.visits if setting_of(v.name) == setting]

    def problem(self, setting: str) -> str:
        """Why a setting has no result, in a sentence; empty if it has one."""
        found = self.of(setting)
        return "; ".join(f"visit {v.name}: {v.problem}" for v in found if v.problem) or ("" if found else "not visited")

    @property
    def valid(self) -> list[str]:
        """The settings that have a result."""
        return [name for name in self.settings if not self.problem(name)]

    def sessions(self, setting: str, name: str) -> list[list[float]]:
        """A metric's samples, a list for each visit that has it."""
        return [samples for v in self.of(setting) if (samples := v.samples(name))]

    def median(self, setting: str, name: str) -> float:
        """Of a metric over all repetitions; NaN where it was not measured."""
        return float(np.median(np.concatenate(found))) if (found := self.sessions(setting, name)) else math.nan

    def against(self, setting: str, name: str = "") -> Against:
        """A valid setting against the valid untuned run, in one metric (the headline). So sure that of all settings together, none of which
        changes anything, one in fifty sweeps would find one that does (Bonferroni).

        Raises:
            ValueError: as `verdicts.judge`.
        """
        name = name or self.headline
        sure = 1 - ALPHA / max(1, len(self.settings) - 1)
        v = verdicts.judge(self.sessions(UNTUNED, name), self.sessions(setting, name), direction=metrics.kind(name).direction, delta=DELTA, margin=MARGIN,
                           confidences=(sure, sure))
        return Against(*(1 + verdicts.change(x, "higher") for x in (v.effect, v.high, v.low)), v.confidence, v.status)

    def moved(self, setting: str) -> str:
        """How the machine itself differed from the untuned run's visits, in words, where one of the controls lies outside
        theirs by more than is tolerated and a gain may be its own (`gained`); else empty."""
        found = [f"{name.removesuffix('_s')} {machine.ratio(move) * 100:.0f} % {'slower' if move > 0 else 'faster'}"
                 for name, move in self._moves(setting).items() if machine.ratio(move) > controls.TOLERANCE]
        return ", ".join(found) if not self.gained(setting) else ""

    def gained(self, setting: str) -> bool:
        """Whether a setting is certainly faster, whatever the machine gave: beyond the tolerance that is as much as the fixed work is
        faster that is faster most, under GPUs no more than the time in which those waited for the untuned run. A slower
        machine gives nothing."""
        against, given = self.against(setting), max((machine.ratio(move) for move in self._moves(setting).values() if move < 0), default=0.0)
        return against.status == "IMPROVED" and (given <= controls.TOLERANCE or against.low > (1 + given) * (1 + MARGIN))

    def _moves(self, setting: str) -> dict[str, float]:
        """Of each control that decides, how far it lies outside the untuned run's visits (`controls.outside`), and of that what counts
        (`machine.bounded`). Of several visits the middle counts."""
        then, now = (1 - busy / 100 if math.isfinite(busy := self.median(which, metric_at(metrics.BUSY, max(self.untuned.points, default=0)))) else 1.0
                     for which in (UNTUNED, setting))
        found = {}
        for name in controls.deciding(self.of(UNTUNED)[0].record["controls"]):
            known, now_s = ([float(np.median(v.record["controls"][name])) for v in self.of(which)] for which in (UNTUNED, setting))
            found[name] = machine.bounded(name, controls.outside(float(np.median(now_s)), known), then, now)
        return found

    @property
    def faster(self) -> list[str]:
        """The settings that are certainly faster than the untuned run (`gained`), the fastest first."""
        found = {name: self.against(name) for name in self.valid if UNTUNED in self.valid and name != UNTUNED and self.gained(name)}
        return sorted(found, key=lambda name: -found[name].ratio)

    @property
    def best(self) -> str:
        """The fastest setting; `untuned` where none is certainly faster. Only what was measured counts, `combined` too."""
        return next(iter(self.faster), UNTUNED)

    def outcome(self, setting: str) -> str:
        """How a setting did against the untuned run, in a few words."""
        if self.problem(setting):
            return "failed"
        return self.against(setting).brief + (f" while the machine had changed ({moved})" if (moved := self.moved(setting)) else "")


def metric_at(name: str, point: int) -> str:
    """A metric's name at a point of the sweep; 0: there is none."""
    return f"{name}@{point}" if point else name


def setting_of(visit: str) -> str:
    """The setting of a visit, by its name `<nn>-<setting>`."""
    return visit.partition("-")[2]


def order(settings: list[str], rounds: int) -> list[str]:
    """Names of the visits in their order: each setting once a round, every other round backwards, and the untuned run before the first round
    and after each, so that an even drift of the machine falls on all alike. `combined`, which is known last, comes last, once for each round."""
    tried = [name for name in settings if name not in (UNTUNED, COMBINED)]
    turns = [UNTUNED]
    for turn in range(rounds):
        turns += [*(tried[::-1] if turn % 2 else tried), UNTUNED]
    turns += [COMBINED] * (rounds if COMBINED in settings else 0)
    return [f"{number:02}-{name}" for number, name in enumerate(turns, start=1)]


def write_plan(tuning: Tuning) -> None:
    """Write the plan, before the first visit and when `combined` comes into it."""
    settings = {name: exam.model_dump(mode="json") for name, exam in tuning.settings.items()}
    files.write_json(paths.tune_folder(tuning.run) / PLAN, {
        "run": tuning.run, "started": tuning.started, "rounds": tuning.rounds, "order": list(settings), "settings": settings, "members": tuning.members,
        "stopped": tuning.stopped})


def read(run: str) -> Tuning:
    """The latest tuning of a run.

    Raises:
        BadInput: there is none.
    """
    folder = paths.tune_folder(run)
    if not (folder / PLAN).exists():
        raise BadInput(f"run '{run}' has no tuning in {folder}; expected make tune RUN={run} first")
    plan = files.read_json(folder / PLAN)
    settings = {name: params.check(plan["settings"][name], PLAN) for name in plan["order"]}
    visits = paired.read_visits(folder, order(plan["order"], plan["rounds"]), run)
    return Tuning(run, plan["started"], plan["rounds"], settings, plan["members"], visits, plan.get("stopped", ""))


def point_table(tuning: Tuning) -> pd.DataFrame:
    """A row for each setting with a result and point of the sweep, medians over all repetitions: setting, point,
    speed and latency (as the picture has them), against, low, high (ratio to the untuned), ttft_ms, tpot_ms, busy_pct,
    bandwidth_pct, compute_pct, bound, startup_s; NaN where it was not measured."""
    rows = []
    for name in tuning.valid:
        bound = [p for v in tuning.of(name) for p in v.record["bound"]]
        for point in tuning.untuned.points or [0]:
            here = [p for p in bound if p["point"] == point]
            speed = metric_at(SPEED, point)
            ratio = tuning.against(name, speed) if UNTUNED in tuning.valid else None
            rows.append({"setting": name, "point": point, "speed": tuning.median(name, speed), "latency": tuning.median(name, metric_at(LATENCY, point)),
                         "against": ratio.ratio if ratio else math.nan, "low": ratio.low if ratio else math.nan, "high": ratio.high if ratio else math.nan,
                         "ttft_ms": tuning.median(name, metric_at("ttft_p50_ms", point)), "tpot_ms": tuning.median(name, metric_at("tpot_p50_ms", point)),
                         **{key: _mean([p[key] for p in here]) for key in ("busy_pct", "bandwidth_pct", "compute_pct")},
                         "bound": ", ".join(dict.fromkeys(p["bound"] for p in here)), "startup_s": tuning.median(name, "startup_s")})
    return pd.DataFrame(rows)


def roofs(points: pd.DataFrame) -> dict[str, list[tuple[float, float]]]:
    """The two roofs in the plane of the picture, a place for each point of the sweep, (latency, speed).

    A pass that reached a share s of a roof would at the roof take s of its time: all requests together, and each of
    them, would be 1/s times as fast. Of the settings that one counts which the roof leaves most room, for it needs the
    fewest bytes (or FLOPs) a token.

    Args:
        points: as `point_table`.

    Returns:
        By `bandwidth` and `compute`; empty where vLLM gave no estimates.
    """
    found = {}
    for roof, share in zip(("bandwidth", "compute"), roofline.SHARES, strict=True):
        column = points[share.replace("_roof", "")] / 100
        at_roof = pd.DataFrame({"point": points.point, "latency": points.latency / column, "speed": points.speed / column})[column > 0]
        best = at_roof.loc[at_roof.groupby("point").speed.idxmax()]
        if len(best):
            found[roof] = list(zip(best.latency, best.speed, strict=True))
    return found


def pareto(points: pd.DataFrame) -> list[tuple[str, int]]:
    """The (setting, point) on the Pareto front, by rising speed of a request: nothing that was measured is faster for
    all requests together and for each of them."""
    front, highest = [], -math.inf
    for row in points.sort_values(["latency", "speed"], ascending=False).itertuples():
        if row.speed > highest:
            highest = row.speed
            front.append((row.setting, row.point))
    return front[::-1]


def verdict(tuning: Tuning) -> tuple[str, str]:
    """Status of a tuning and the sentence that says what was found: IMPROVED, PASSED (nothing is faster), INCONCLUSIVE
    (nor can it be said, on a machine that changed) or INVALID."""
    failed = [name for name in tuning.settings if tuning.problem(name)]
    if tuning.stopped:
        return "INVALID", f"{tuning.stopped} after {sum(bool(v.record) for v in tuning.visits)} of {len(order(list(tuning.settings), tuning.rounds))} visits: what these measured is here, and no setting is called the best; make tune RUN={tuning.run} ADD=1 goes on"
    if UNTUNED in failed:
        return "INVALID", f"{tuning.problem(UNTUNED)}: nothing to hold the settings against"
    tried = [name for name in tuning.valid if name != UNTUNED]
    if not tried:
        return "INVALID", "; ".join(f"{name}: {tuning.problem(name)}" for name in failed) or "no setting was tried"
    less = f"; {', '.join(failed)} failed" if failed else ""
    speed, best = tuning.median(UNTUNED, tuning.headline), tuning.best
    said = f"the untuned {metrics.number(speed)} tok/s in {tuning.headline}"
    if best == UNTUNED:
        nearest = max(tried, key=lambda name: tuning.against(name).ratio)
        less = f"; the nearest is {nearest}, {interval(tuning.against(nearest))}{less}"
        if moved := [name for name in tried if tuning.moved(name)]:
            return "INCONCLUSIVE", f"the machine itself ran at another speed beside {len(moved)} of {len(tried)} settings than beside the untuned run, and none can be called faster than {said}{less}"
        return "PASSED", f"nothing that was tried is certainly faster than {said}{less}"
    made_of = f" ({' + '.join(tuning.members)})" if best == COMBINED else ""
    return "IMPROVED", f"{best}{made_of} is the fastest of {len(tried)} settings: {metrics.number(tuning.median(best, tuning.headline))} tok/s, {interval(tuning.against(best))} {said}{less}"


def interval(a: Against) -> str:
    """A comparison in words."""
    return f"{a.ratio:.2f} times ({a.confidence * 100:.3g} % interval {a.low:.2f} to {a.high:.2f})"


def notes(tuning: Tuning) -> list[str]:
    """What a reader should know beside the verdict, a sentence each."""
    found = [] if tuning.rounds > 1 else ["each setting was visited once, and the untuned run before and after them: what differs between sessions is assumed to be 1 %, and seen of that run alone; ROUNDS=2 sees it of all"]
    measured = [v for v in tuning.visits if v.record]
    drifts = {name.removesuffix("_s"): paired.drift(measured, name) for name in (measured[0].record["controls"] if measured else ())}
    moved = {name: how for name in tuning.valid if UNTUNED in tuning.valid and (how := tuning.moved(name))}
    if moved:
        found.append(f"the fixed work ran at another speed than beside the untuned run ({'; '.join(f'{name}: {how}' for name, how in moved.items())}): "
                     "whatever their ratios are, these are not called faster")
    return found + paired.drift_notes(drifts, "settings that were visited at the two ends of it compare badly")


def setting_table(tuning: Tuning) -> pd.DataFrame:
    """A row for each setting: its name and what it changes."""
    def changed(name: str, exam: Exam) -> str:
        words = "\n".join(sweeps.text(*change) for change in sweeps.changes(tuning.untuned, exam).items())
        return "the run as the sweep has it" if name == UNTUNED else f"{' + '.join(tuning.members)}:\n{words}" if name == COMBINED else words
    return pd.DataFrame([{"setting": name, "changes": changed(name, exam)} for name, exam in tuning.settings.items()])


def reading_table(tuning: Tuning, points: pd.DataFrame) -> pd.DataFrame:
    """For reading: `point_table` with units in the heads, what holds for a whole setting in its first row, and a row for
    each setting without a result."""
    device = "GPU" if any(v.record["machine"]["gpus"] for v in tuning.visits if v.record) else "CPU"
    heads = {"setting": "setting", "point": "in flight", "speed": "output tok/s", "against": "× untuned", "interval": "interval", "ttft_ms": "TTFT p50, ms", "tpot_ms": "TPOT p50, ms",
             "busy_pct": f"{device} busy, %", "bandwidth_pct": "% of bandwidth", "compute_pct": "% of compute", "startup_s": "start, s", "valid": "valid"}
    failed = pd.DataFrame([{"setting": name, "valid": problem} for name in tuning.settings if (problem := tuning.problem(name))])
    if len(points):
        # The word joiners keep an interval on one line.
        told = [f"{row.low:.2f}\u2060–\u2060{row.high:.2f}" if row.against == row.against and row.setting != UNTUNED else "" for row in points.itertuples()]
        other = [name for name in tuning.valid if UNTUNED in tuning.valid and tuning.moved(name)]
        points = points.assign(interval=told, valid=["yes, machine changed" if name in other else "yes" for name in points.setting], point=points.point.astype("Int64"), against=points.against.round(2))
        for share in ("busy_pct", "bandwidth_pct", "compute_pct"):
            points[share] = points[share].round(1)
        again = points.setting.duplicated()
        points.loc[again, ["setting", "valid"]] = ""
        points.loc[again, "startup_s"] = math.nan
    return pd.concat([points, failed]).reindex(columns=list(heads)).rename(columns=heads)


def roof_sentence(tuning: Tuning, points: pd.DataFrame) -> str:
    """How far below the nearer roof the best setting is at the sweep's largest point, and what it is bound by there."""
    here = points[(points.setting == (tuning.best if UNTUNED in tuning.valid else points.setting.iloc[0]))].iloc[-1]
    shares = {roof: share for roof, share in (("bandwidth", here.bandwidth_pct), ("compute", here.compute_pct)) if share == share}
    at = f"{here.setting}{f' at {here.point:,}' if here.point else ''}"
    if not shares:
        return f"{at} is {here.bound}; vLLM gave no estimate of its bytes and FLOPs, so there is no roof to draw."
    roof = max(shares, key=lambda name: shares[name])
    return f"{at} reaches {shares[roof]:.0f} % of the {roof} roof, the nearer one, and is {here.bound}."


def result(tuning: Tuning, points: pd.DataFrame) -> dict[str, Any]:
    """What goes into `result.json`; `points` as `point_table`."""
    status, sentence = verdict(tuning)
    return plain({
        "schema_version": SCHEMA_VERSION, "run": tuning.run, "title": tuning.untuned.title, "status": status, "sentence": sentence, "started": tuning.started,
        "finished": now(), "rounds": tuning.rounds, "headline": tuning.headline, "best": None if status == "INVALID" else tuning.best,
        "params": tuning.untuned.model_dump(mode="json"),
        "settings": {name: {"changes": [sweeps.text(*change) for change in sweeps.changes(tuning.untuned, exam).items()], "problem": tuning.problem(name),
                            "members": tuning.members if name == COMBINED else []} for name, exam in tuning.settings.items()},
        "points": points.to_dict("records"), "pareto": pareto(points) if len(points) else [], "roofs": roofs(points) if len(points) else {}, "notes": notes(tuning),
        "visits": [{"name": v.name, "problem": v.problem, "finished": v.record.get("finished")} for v in tuning.visits]})


def _mean(values: list[float | None]) -> float:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else math.nan
