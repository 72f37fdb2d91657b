"""What the machine has to say of a verdict on speed: whether it ran at the golden's speed, and what of a loss may be its own."""
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from workbook import controls, goldens, metrics, platforms, verdicts

Samples = dict[str, Sequence[Sequence[float]]]

CHANGED, OTHERS = "the machine itself changed", "other processes were at work"
EXCUSED = 2
"""A loss of more than so many times what the slowest fixed work certainly lost is not the machine's: a load that waits for several parts of it may
lose more than each of them, and seldom more than two together."""


class Move(NamedTuple):
    """How a control's time moved against the golden's, in fractions of it: positive where it takes longer.

    Attributes:
        by: of the means of the sessions' mean logs.
        visible: from how much on, in either direction, a move is more than its own noise.
        certain: of `by`, what is more than noise (`_shrunk`).
    """
    by: float
    visible: float
    certain: float


def judge(golden: goldens.Golden, *measured: dict[str, list[float]], samples: Samples, judged: Iterable[str] = ()) -> dict[str, Any]:
    """Whether the machine itself runs at the golden's speed.

    A host that is slower delays a GPU only while that has nothing to do, so it costs the load's makespan at most the share of
    the time in which the GPU idles; and one that is faster gains at most the share in which it idled for the golden. So much of
    what the host's fixed work moved counts, and all of what the device's did. (A start, or the time of one request, has no
    such bound: see `doubted`.)

    Args:
        measured: the controls of each session.
        samples: of each metric of these sessions, by session; those of `metrics.OTHERS` and `metrics.BUSY` are what counts.
        judged: the metrics whose points of a sweep count; none: all points.

    Returns:
        Of each control, as fractions of its time: its `moves`, from where on they are `visible` and what of them is `certain`
        (`Move`), what of them `counts`, and what of that may be its `share` of a loss, of those that decide. The
        `tolerance`; `others_pct`, and `others_cost` (`_cost_of_others`); a sentence that says why a loss may be the machine's (`slows`), and one why it may hide one (`speeds`),
        or empty; whether speeds are `comparable`, with neither of them, and if not `why`, in brief; a sentence on all of it.
    """
    points = {_point(name) for name in judged}
    samples, known = ({name: sessions for name, sessions in side.items() if not points or _point(name) in points}
                      for side in (samples, {name: each.sessions for name, each in golden.metrics.items()}))
    others_pct = float(np.mean(others)) if (others := _means(samples, metrics.OTHERS)) else 0.0
    return _weighed(control_moves(golden, *measured), others_pct, _cost_of_others(others_pct, golden.key.platform), _idle_share(known), _idle_share(samples))


def control_moves(golden: goldens.Golden, *measured: dict[str, list[float]]) -> dict[str, Move]:
    """How each control that all have moved, by the verdict's own rule (`verdicts.judge`): a host's loop whose single times are of two
    kinds, 70 and 130 ms (as on the GPU hosts of docs/visits.md), moves by chance as far as a quiet one does by a cause."""
    return {name: move(golden.controls[name], [session[name] for session in measured])
            for name in sorted(golden.controls.keys() & set.intersection(*map(set, measured)))}


def move(known: Sequence[list[float]], now: Sequence[list[float]]) -> Move:
    """A control's move, from its times by session on either side.

    One odd time of a session adds more to its noise than to its mean, so that it shows no move; what is taken off a loss for certain is what
    is left without the highest and the lowest of each session of five or more. Where whole sessions are of one kind, three that are alike
    by chance look quieter than they are.
    """
    found, steady = (verdicts.judge(*([cut(times) for times in side] for side in (known, now)), direction="lower", margin=0.0) for cut in (list, _inner))
    error = steady.noise * math.sqrt(1 / len(known) + 1 / len(now))  # for as many times a session on either side
    return Move(*map(math.expm1, (found.effect, found.smallest_visible, _shrunk(min(found.effect, steady.effect, key=abs), error))))


def _inner(times: list[float]) -> list[float]:
    return sorted(times)[1:-1] if len(times) >= 5 else times


def _shrunk(effect: float, error: float) -> float:
    """What of an effect is more than its noise: times max(0, 1 - error^2 / effect^2), the positive part of an estimate shrunk by its
    standard error (Efron and Morris, J. Am. Stat. Assoc. 68, 1973)."""
    return effect * max(0.0, 1 - (error / effect) ** 2) if effect else 0.0


def _weighed(moves: dict[str, Move], others_pct: float, others_cost: float, then: float = 1.0, now: float = 1.0) -> dict[str, Any]:
    """As `judge`, with the GPUs idle for these shares of the time, for the golden and now; 1: all of what moved counts."""
    deciding = controls.deciding(moves)
    counts = {k: bounded(k, v.by, then, now) for k, v in moves.items()}
    shares = {k: max(bounded(k, moves[k].certain, then, now), 0.0) for k in deciding}
    moved = [k for k in deciding if ratio(counts[k]) > controls.TOLERANCE and ratio(moves[k].by) > moves[k].visible]
    slower, faster = (", ".join(_said(k, moves[k], counts[k], 1) for k in moved if sign * counts[k] > 0) for sign in (1, -1))
    slows = [f"fixed work took longer than for the golden: {slower}, so {CHANGED} and may have caused a loss"] if slower else []
    if others_pct > controls.OTHERS_PCT:
        slows += [f"other processes took {others_pct:.3g} % of the cores while it was measured (at most {controls.OTHERS_PCT} %) and may have caused a loss"]
    speeds = [f"fixed work took less time than for the golden: {faster}, so {CHANGED} and may hide a loss"] if faster else []
    each = ", ".join(_said(k, v, counts[k]) + (" before the load" if k not in deciding else "") for k, v in moves.items())
    fields = {field: {k: getattr(v, field) for k, v in moves.items()} for field in ("visible", "certain")}
    return {"moves": {k: v.by for k, v in moves.items()}, **fields, "counts": counts, "share": shares, "tolerance": controls.TOLERANCE, "others_pct": others_pct,
            "others_cost": others_cost, "slows": "; ".join(slows), "speeds": "; ".join(speeds), "comparable": not (slows or speeds), "why": CHANGED if moved else OTHERS if slows else "",
            "sentence": "; ".join([f"the fixed work against the golden's: {each or 'the golden has none'}", *slows, *speeds])}


def _said(control: str, moved: Move, counts: float, digits: int = 0) -> str:
    """A control's move in words: up to where it may be noise, if that is more than is tolerated, and what of it counts where that is less."""
    name, by = control.removesuffix("_s"), ratio(moved.by) * 100
    if round(by, digits) == 0:
        return f"{name} the same"
    notes = [f"up to {moved.visible * 100:.{digits}f} % may be chance"] if moved.visible > controls.TOLERANCE else []
    notes += [f"at most {ratio(counts) * 100:.{digits}f} % of a pass: the GPUs were busy"] if counts != moved.by else []
    return f"{name} {by:.{digits}f} % {'slower' if moved.by > 0 else 'faster'}" + (f" ({', and '.join(notes)})" if notes else "")


def ratio(move: float) -> float:
    """By how much the slower of two is slower, as a fraction, for a move in either direction."""
    return math.expm1(abs(math.log1p(move)))


def bounded(control: str, move: float, then: float, now: float) -> float:
    """What of a control's move can be the load's, with the GPUs idle for these shares of the time, for the golden and now."""
    return move if control.startswith("device") else float(np.clip(move, -then, now / max(1 - now, 1e-9)))


def doubted(name: str, outcome: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A metric's outcome (`results.judge_metric`) with what the machine (`judge`) has to say of it: where that leaves it in doubt it is
    INCONCLUSIVE, `without_controls` is the status that the samples alone gave, and `doubt` the reason in brief.

    A slower machine may have caused a loss, and cannot hide one; a faster machine may hide one, and cannot have caused it. So a loss on a
    machine that is faster stands, and so does a pass on one that is slower, and a loss that is too large for it (`_too_large`).
    What a metric of the whole makespan loses by a slow host is bounded by the GPUs' idle time. A start, and the time of a
    request while others keep the GPU busy, can be as slow as the host is.
    """
    if not metrics.of_makespan(name):
        moves = {k: Move(by, found["visible"][k], found["certain"][k]) for k, by in found["moves"].items()}
        found = _weighed(moves, found["others_pct"], found["others_cost"])
    may = {"REGRESSED": [found["slows"]], "INCONCLUSIVE": [found["slows"], found["speeds"]], "INVALID": [], "NO_GOLDEN": []}.get(outcome["status"], [found["speeds"]])
    if large := _too_large(outcome, found):
        return outcome | {"sentence": f"{outcome['sentence']}; {large}"}
    doubt = "; ".join(filter(None, may))
    brief = CHANGED if CHANGED in doubt else OTHERS if doubt else "the machine may have caused it"
    if not (doubt := doubt or _share(outcome, found)):
        return outcome
    alone = "" if outcome["status"] == "INCONCLUSIVE" else f"the samples alone say {outcome['status']}, but "
    said = {"sentence": f"{outcome['sentence']}; {alone}{doubt}", "brief": f"{outcome.get('brief', outcome['sentence'])}{', but ' if alone else '; '}{brief}"}
    return outcome | said | {"status": "INCONCLUSIVE", "without_controls": outcome["status"], "doubt": brief}


def _too_large(outcome: dict[str, Any], found: dict[str, Any]) -> str:
    """Why a machine that is slower than is tolerated, or other processes, do not excuse a loss: it is one even with `EXCUSED` times off
    what the slowest fixed work lost, or those can cost; empty where they may. A band has no effect."""
    if outcome["status"] != "REGRESSED" or "effect" not in outcome or not found["slows"]:
        return ""
    lost = max(np.log1p([*found["share"].values(), found["others_cost"]]))
    if outcome["effect"] - EXCUSED * lost <= outcome["smallest_visible"]:
        return ""
    return f"{found['slows'].replace(' and may have caused a loss', '')}, but not by so much that it may have caused this loss"


def _cost_of_others(others_pct: float, platform: str) -> float:
    """By how much longer a load may take through other processes that took so many percent of a CPU's cores, as a fraction; 0 where
    they are tolerated. Its threads wait for the slowest, so what they took may count as if it were of one core; with a core that is
    shared fairly a thread has half of it and more."""
    if others_pct <= controls.OTHERS_PCT:
        return 0.0
    taken = min(others_pct / 100 * platforms.count(platform), 0.5)
    return taken / (1 - taken)


def _share(outcome: dict[str, Any], found: dict[str, Any]) -> str:
    """Why a loss is not told from the machine's own; empty where it is, or where there is none. A load that is bound by what
    is timed loses at most as much as the part that slowed most, so that much may not be the engine's: what is left has
    to be above the smallest loss that is called one. Both are held against the mean of the golden's sessions. Where fixed
    work is slow by chance or binds no load, a loss may be missed by that much; none is invented."""
    if outcome["status"] != "REGRESSED" or "effect" not in outcome:  # a band has no effect
        return ""
    slowest, share = max(found["share"].items(), key=lambda each: each[1], default=("", 0.0))
    left, visible = outcome["effect"] - np.log1p(share), outcome["smallest_visible"]
    if share <= 0 or left > visible:
        return ""
    part = ""
    if share < found["moves"][slowest]:
        part = f" (at most {share * 100:.1f} % of a pass: the GPUs were busy)" if share < found["certain"][slowest] else f" (for certain {share * 100:.1f} %)"
    return (f"{slowest.removesuffix('_s')}, fixed work of the machine's, took {found['moves'][slowest] * 100:.1f} % longer than in the mean of the golden's sessions{part}: with that "
            f"taken off {max(-np.expm1(-left), 0) * 100:.1f} % is left, and only more than {-np.expm1(-visible) * 100:.1f} % is called a loss")


def _idle_share(samples: Samples) -> float:
    """Share of the time in which the least busy GPU had nothing to do, at the point of a sweep that left it idle most; 1
    where that was not measured."""
    return 1 - min(busy) / 100 if (busy := _means(samples, metrics.BUSY)) else 1.0


def _point(name: str) -> str:
    return name.partition("@")[2]


def _means(samples: Samples, metric: str) -> list[float]:
    """The means of a metric over all sessions, one for each point of a sweep."""
    means = [np.concatenate([np.asarray(s, dtype=float) for s in sessions]) for name, sessions in samples.items() if name.partition("@")[0] == metric]
    return [float(np.nanmean(values)) for values in means if np.isfinite(values).any()]
