"""`result.json`: everything one run found, in one file with a stable schema."""
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from workbook import accuracy, bands, degeneration, drift, goldens, machine, metrics, scaling, suspects, verdicts
from workbook.degeneration import Tally
from workbook.params import Exam, Gate
from workbook.schemas import RESULT_VERSION
from workbook.scraps import plain
from workbook.statuses import IN_DOUBT, overall
from workbook.validity import Completeness, expected_replicas

SUSPECTS = 4
"""How many differences from the golden the first screen names."""
FEW = 2
"""Up to so many GPUs or replicas the first screen names one by one."""
ALONE_PCT = 80
"""Share of a pass from which the answer that ends last is what makes it as long as it is."""


def prior_sd(name: str) -> float:
    """How much sessions are taken to differ in a metric before any is seen."""
    return verdicts.ONCE_PRIOR_SD if metrics.kind(name).once else verdicts.PRIOR_SD


def judge_metric(name: str, gate: Gate, golden: goldens.Golden, sessions: list[list[float]]) -> dict[str, Any]:
    """Verdict on one gated metric, with its sentence.

    Args:
        sessions: the new samples, a list for each session.
    """
    if not sessions or not np.isfinite(np.concatenate(sessions)).all():
        return {"status": "INVALID", "sentence": f"{name} is gated and could not be measured"}
    # What the golden lacks is no fault of the run's: the other gates count, and a new golden can be recorded.
    known = golden.metrics.get(name)
    if known is None:
        return {"status": "NO_GOLDEN", "sentence": f"{name} is gated and the golden does not have it; make record and then make bless give it one"}
    if gate.rule == "band":
        return _judge_band(name, gate, known, sessions)
    if "imported" in golden.subject:
        return {"status": "NO_GOLDEN", "sentence": f"{name} is gated by an interval and the golden was imported, one number whose noise is not known; expected rule: band, or a golden that was recorded"}
    if any(value <= 0 for samples in known.sessions for value in samples):
        return {"status": "NO_GOLDEN", "sentence": f"{name} is gated and the golden has a sample of it that is not positive; expected none, since they are compared in logs"}
    if (np.concatenate(sessions) <= 0).any():
        return _judge_nothing(name, known, np.concatenate(sessions))
    verdict = verdicts.judge(known.sessions, sessions, direction=known.direction, delta=gate.delta, margin=gate.margin, prior_sd=prior_sd(name))
    shifts = [verdicts.change(x, known.direction) * 100 for x in (verdict.effect, verdict.low, verdict.high)]
    brief = f"{name} {shifts[0]:+.1f} % against the golden ({verdict.confidence * 100:.0f} % interval {min(shifts[1:]):+.1f} to {max(shifts[1:]):+.1f} %"
    seen = f"a measured loss of more than {abs(verdicts.change(verdict.smallest_visible, known.direction)) * 100:.1f} % would have been called one"
    left = f"; a loss of {gate.delta * 100:.0f} % is neither shown nor ruled out" if verdict.status == "INCONCLUSIVE" else ""
    return asdict(verdict) | {"sentence": f"{brief}; {seen}){left}", "brief": f"{brief}){left}", "delta": gate.delta, "margin": gate.margin}


def _judge_nothing(name: str, known: goldens.Samples, samples: np.ndarray) -> dict[str, Any]:
    """Verdict on samples of which some are 0 (no good request, no preemption), where the golden's are not. They have no
    logs: half of them decide, and fewer leave it open; so does one that is worse than any of the golden's."""
    none, worst = int((samples <= 0).sum()), max(value for session in known.sessions for value in session)
    clear = "REGRESSED" if known.direction == "higher" else "IMPROVED" if samples.max() <= worst else "INCONCLUSIVE"
    return {"status": clear if 2 * none >= samples.size else "INCONCLUSIVE",
            "sentence": f"{name} is 0 in {none} of {_count(samples.size, 'repetition')}; the golden's median is {metrics.number(np.median(np.concatenate(known.sessions)))} {known.unit}"}


def _judge_band(name: str, gate: Gate, known: goldens.Samples, sessions: list[list[float]]) -> dict[str, Any]:
    """Verdict by `rule: band`, on the medians of all samples. An improvement never fails."""
    golden, new = (float(np.median(np.concatenate(s))) for s in (known.sessions, sessions))
    if golden <= 0:
        return {"status": "NO_GOLDEN", "sentence": f"{name} is gated by a band and the golden's median is {metrics.number(golden)}; expected a positive one, since a band is a share of it"}
    band = bands.judge(name, golden, new, direction=known.direction, low=gate.low, high=gate.high)
    better = (new > golden) == (known.direction == "higher")
    return {"status": "PASSED" if band.passed else "IMPROVED" if better else "REGRESSED", "sentence": band.sentence,
            "rule": "band", "band": [gate.low, gate.high], "margin": 1 - gate.low}


def verdict_of(validity: Completeness, golden: goldens.Golden | None, no_golden: str, gated: dict[str, dict],
               right: dict | None, drifted: dict | None, *answers: dict | None) -> tuple[str, str]:
    """Status of the run and the sentence that says why. Validity comes first; the worst of the rest decides.

    Args:
        gated: as `judge_speed`.
        answers: what the judges of `quality` found.
    """
    if validity.problems:
        return "INVALID", "; ".join(validity.problems)
    if golden is None:
        return "NO_GOLDEN", no_golden
    found = [*gated.values(), *(p for p in (right, drifted, *answers) if p and p["status"] != "NO_GOLDEN")]
    return _worst(found) if found else ("NO_GOLDEN", "the golden keeps nothing that this run is judged by" if right else "no metric is gated, and nothing else of this run can be judged")


def in_brief(status: str, sentence: str, gated: dict[str, dict], others: Iterable[dict | None], looks: Sequence[dict]) -> str:
    """What decides, in brief: the first line of the first screen, whose answers say the rest.

    Args:
        status, sentence: as `verdict_of`, which says it in full.
        others: what else was judged: accuracy, drift, answers.
        looks: those at speed.
    """
    if status in ("INVALID", "NO_GOLDEN"):
        return sentence
    of_speed, rest = ([p for p in parts if p and p["status"] == status] for parts in (gated.values(), others))
    deciding = of_speed + rest if status in ("REGRESSED", "INCONCLUSIVE") or not of_speed else of_speed
    in_doubt = bool(of_speed) and looks[0]["status"] in IN_DOUBT  # the rest is judged by the first session
    return "; ".join([*(p.get("brief", p["sentence"]) for p in deciding), *([f"speed judged by {_count(len(looks), 'session')}"] if in_doubt else [])])


def judge_speed(gates: dict[str, Gate], golden: goldens.Golden, sessions: dict[str, list[list[float]]], found: dict[str, Any]) -> dict[str, dict]:
    """The verdict on each gated metric, as `judge_metric`, with what the machine has to say of it (`machine.doubted`).

    Args:
        found: as `machine.judge`.
        sessions: the new samples of each metric, a list for each session; of one that was not measured none.
    """
    gated = {name: judge_metric(name, gate, golden, sessions.get(name, [])) for name, gate in gates.items()}
    return {name: machine.doubted(name, outcome, found) for name, outcome in gated.items()}


def look(gates: dict[str, Gate], golden: goldens.Golden, by_repetition: pd.DataFrame, controls_of: Sequence[dict[str, list[float]]]) -> dict[str, Any]:
    """Judge the speed of the sessions there are.

    Args:
        by_repetition: of these sessions, as `metrics.by_repetition`.
        controls_of: the controls of each of them.

    Returns:
        status and sentence, from those of the gated metrics (`gates`) and the `controls`; number of `sessions`.
    """
    found = machine.judge(golden, *controls_of, samples={name: [by_repetition[name]] for name in by_repetition}, judged=gates)
    gated = judge_speed(gates, golden, {name: metrics.sessions(by_repetition, name) for name in gates}, found)
    status, sentence = _worst(gated.values())
    return {"status": status, "sentence": sentence, "sessions": len(controls_of), "gates": gated, "controls": found}


def declaration(looks: list[dict], confirmed: bool) -> str:
    """What a reader must know of how the verdict on speed came about; empty where the first look settled it.

    Args:
        looks: of the first session and, where the confirming one can be judged, of both.
        confirmed: whether that one was taken.
    """
    if not looks or looks[0]["status"] not in IN_DOUBT:
        return ""
    said = [f"{found['status']} ({_brief(found)})" for found in looks]
    if len(looks) == 1:
        return f"first look: {said[0]}" + ("" if confirmed else "; no confirming session was taken")
    return f"first look: {said[0]}; a confirming session was taken: {said[1]} by both together"


def _brief(found: dict) -> str:
    """The effect on each gated metric (of one gated by a band its name), and what the machine had to do with it."""
    effects = [f"{name} {verdicts.change(outcome['effect'], metrics.kind(name).direction) * 100:+.1f} %" if "effect" in outcome else name
               for name, outcome in found["gates"].items()]
    return ", ".join([*effects, *dict.fromkeys(outcome["doubt"] for outcome in found["gates"].values() if "doubt" in outcome)])


def _worst(parts: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """The status that decides, with the sentences of all parts that have it."""
    parts = list(parts)
    status = overall([p["status"] for p in parts])
    return status, "; ".join(p["sentence"] for p in parts if p["status"] == status)


def with_suspects(status: str, sentence: str, differences: list[dict[str, str]]) -> str:
    """The sentence of a run, and what differs from the golden (`suspects.differences`) where that may be the cause; what the
    fixed work has to say of it is in the sentence already."""
    names = [row["what"].removeprefix("machine.") for row in differences if not row["what"].startswith("controls.")]
    if status not in ("REGRESSED", "IMPROVED", "INCONCLUSIVE") or not names:
        return sentence
    return f"{sentence}. Not as they were for the golden: {suspects.first_of(names, SUSPECTS)}"


def judge_accuracy(scores: pd.DataFrame, golden: goldens.Golden | None, scorer: str | None = None, *, sampled: bool = False) -> dict[str, Any]:
    """Accuracy with its interval and, with a golden whose answers the same scorer judged, the change on the same questions; `sampled`
    as `accuracy.compare`."""
    correct = goldens.correctness(scores)
    estimate = accuracy.estimate(correct)
    found = asdict(estimate) | {"status": "NO_GOLDEN", "sentence": estimate.sentence}
    if golden and golden.correct is not None and not goldens.same_scorer(golden, scorer):
        found["sentence"] += f"; not held against the golden's, which {golden.scorer} judged and not {scorer}"
    elif golden and golden.correct is not None:
        before = np.array(golden.correct, dtype=bool)
        drop, known = accuracy.compare(before, correct, sampled=sampled), accuracy.estimate(before)
        found |= {"status": drop.status, "change": -drop.drop, "change_low": -drop.high, "change_high": -drop.low, "smallest_visible": drop.smallest_visible, "p": drop.p, "golden": known.value, "golden_low": known.low, "golden_high": known.high,
                  "sentence": f"accuracy {found['value'] * 100:.1f} %, {drop.sentence}"}
    return found


def judge_drift(golden: goldens.Golden, logprobs: list[list[float]]) -> dict[str, Any]:
    """How far the model's log-probabilities of the golden's answers moved."""
    found = drift.compare([s.logprobs for s in golden.sequences], logprobs, drift.tolerance(golden))
    return asdict(found) | {"sentence": f"log-probabilities of the golden's answers moved by {found.mean:.4f} nats on average "
                                        f"(99th percentile {found.p99:.4f}, limit {found.tolerance:.3g})"}


def five_questions(exam: Exam, validity: Completeness, record: dict[str, Any], requests: pd.DataFrame, gated: dict, no_golden: str,
                   right: dict | None, drifted: dict | None, scaled: dict | None = None, declared: str = "", answers: Sequence[dict | None] = (),
                   rates: dict[str, Tally] | None = None) -> list[dict[str, str]]:
    """The first screen: what every reader wants to know, in words and numbers.

    Args:
        record, requests: the run's `run.json` and `requests.parquet`.
        scaled: what `scaling.against_one` found.
        declared: how the verdict on speed came about (`declaration`).
        answers: what the judges of `quality` found.
        rates: as `degeneration.tally`.
    """
    asked = f"{exam.load} of {', '.join(map(str, exam.points))}" if exam.points else f"{exam.num_prompts:,} prompts × {_count(exam.n, 'sample')}"
    over = f" × {count} sessions" if (count := requests.session.nunique()) > 1 else ""
    arrived = f"{validity.arrived:,} of {validity.expected:,} answers ({asked} × {_count(exam.repetitions, 'repetition')}{over})"
    arrived += "" if not exam.free_to_stop else f"; {degeneration.percent(validity.empty)} empty, {degeneration.percent(validity.cut_off)} cut off at {f'{exam.max_tokens} tokens' if exam.max_tokens else 'their own lengths'}"
    arrived += "".join(f"; {degeneration.sentence(name, tally)}" for name, tally in (rates or {}).items() if tally.count and name not in ("empty", "cut_off"))
    bound = [p["sentence"] for p in record["bound"][-1:]]
    busy = _busy(record["busy"], "; ".join(bound))
    full = "; ".join(filter(None, [busy, record["telemetry_problem"]]))
    balance = _balance(exam, requests, len(record["machine"]["gpus"]))
    if exam.engine == "endpoint":
        full, balance = f"what the endpoint runs on is not seen from here; this machine, its client: {full}", "one endpoint: what is behind it is not seen from here"
    full = "; ".join([*filter(None, [full]), *bound])
    speed = "; ".join([*(g["sentence"] for g in gated.values()), *filter(None, [declared])])
    speed = speed or no_golden or ("not compared" if validity.problems else "no metric is gated")
    if (warmup := record.get("warmup")) and warmup["stable"] is False:
        speed += f"; {warmup['sentence']}"
    correct = "; ".join(p["sentence"] for p in (right, drifted, *answers) if p and p["sentence"]) or ("synthetic weights: speed only, nothing to judge" if exam.weights == "dummy" else "not scored")
    return [
        {"question": "Did every answer arrive?", "answer": "; ".join([arrived, *filter(None, [validity.unknown]), *validity.problems])},
        {"question": "Are the accelerators full?", "answer": full},
        {"question": "Do they pull together?", "answer": "; ".join(filter(None, [balance, scaling.sentence(scaled)]))},
        {"question": "Faster or slower than the golden?", "answer": speed},
        {"question": "Right or wrong?", "answer": correct},
    ]


def _busy(busy: dict[str, float], told: str) -> str:
    """How busy the CPU and the GPUs were, as far as the diagnosis that follows (`told`) does not say the same; of many GPUs the mean and the range."""
    gpus = [value for name, value in busy.items() if name.startswith("gpu")]
    said = [f"{name.removesuffix('_busy_pct').upper()} {value:.0f} % busy" for name, value in busy.items() if len(gpus) <= FEW or not name.startswith("gpu")]
    said += [f"{len(gpus)} GPUs {np.mean(gpus):.0f} % busy ({min(gpus):.0f} to {max(gpus):.0f})"] if len(gpus) > FEW else []
    untold = [part for part in said if (re.sub(r"^GPU\d+", "GPU", part) if len(gpus) == 1 else part) not in told]
    return ", ".join(untold) if said else "the load was too short to sample"


def _balance(exam: Exam, requests: pd.DataFrame, gpus: int) -> str:
    """How evenly the output tokens are spread over the replicas that answered, in the whole session; and, but for an open loop,
    whose end is the schedule's, how long they wait for the slowest at the largest point, and whether the longest answer keeps them."""
    tokens = requests.groupby("replica").output_tokens.sum()
    behind = exam.engine_args.get("data_parallel_size", 1) if exam.engine == "server" else 1
    if behind > 1:
        return f"{behind} data-parallel engines behind {'one server' if exam.replicas == 1 else f'each of {exam.replicas} servers'}: how they share the work is not seen from here"
    count = expected_replicas(exam)
    if len(tokens) < count:  # of those that are as idle vLLM's balancer takes the first
        return f"{len(tokens)} of {count} replicas answered; the others had no request, and the busiest had {tokens.max() / tokens.sum() * 100:.0f} % of the output tokens"
    if len(tokens) == 1:
        return f"one engine over {gpus} GPUs" if gpus > 1 else f"one engine on one {'GPU' if gpus else 'CPU'}: nothing to balance"
    each = ", ".join(f"{count:,}" for count in tokens) if len(tokens) <= FEW else f"{tokens.min():,} to {tokens.max():,}"
    spread = f"with {each} output tokens: the busiest has {tokens.max() / tokens.mean():.2f} × the mean" if tokens.nunique() > 1 else f"each with {tokens.iloc[0]:,} output tokens"
    said = f"{len(tokens)} replicas answered, {spread}"
    largest = requests[requests.point == requests.point.max()]
    idle, alone = np.median([(metrics.straggler(rows), metrics.last_answer(rows)) for _, rows in largest.groupby(["session", "repetition"])], axis=0)
    if exam.open_loop or not np.isfinite(idle):
        return said
    said += f"; {f'at {largest.point.iloc[0]} ' if largest.point.any() else ''}they stand idle {idle:.0f} % of the time on average, until the slowest is done"
    if alone >= ALONE_PCT:
        said += f"; the answer that ended last was coming for {alone:.0f} % of the time, which more replicas shorten only as far as each token comes faster"
    return said


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def metric_table(by_repetition: pd.DataFrame, golden: goldens.Golden | None) -> dict[str, dict]:
    """Samples, median and golden median of every metric of the run or its golden, for `result.json`."""
    table = {}
    for name in dict.fromkeys([*by_repetition, *(golden.metrics if golden else [])]):
        known = golden.metrics.get(name) if golden else None
        kind = metrics.kind(name) if name in by_repetition else known
        table[name] = {
            "unit": kind.unit, "direction": kind.direction,
            "sessions": metrics.sessions(by_repetition, name),
            "median": by_repetition[name].median() if name in by_repetition else None,
            "golden_sessions": known.sessions if known else None,
            "golden_median": float(np.median(np.concatenate(known.sessions))) if known else None,
        }
    return table


def medians(table: dict[str, dict], gated: dict[str, dict], gates: Collection[str] = ()) -> pd.DataFrame:
    """The `metric_table` for a reader: what is gated (as judged, or of `gates` where there is nothing to judge by) comes first, and what
    neither side has not at all."""
    first = {name: "not compared" if row["golden_sessions"] else "no golden" for name, row in table.items() if name in gates and row["sessions"]} | {name: judged["status"] for name, judged in gated.items()}
    rows = [{"metric": name, "unit": row["unit"], "better": row["direction"], "median": row["median"], "golden": row["golden_median"],
             "change %": round(100 * (row["median"] / row["golden_median"] - 1), 1) + 0.0 if row["golden_median"] and row["sessions"] else None,
             "verdict": first.get(name, "reported only" if row["sessions"] else "missing here")}
            for name, row in sorted(table.items(), key=lambda item: item[0] not in first) if name in first or pd.notna(row["median"]) or pd.notna(row["golden_median"])]
    return pd.DataFrame(rows)


def complete(exam: Exam, record: dict, status: str, sentence: str, brief: str, questions: list[dict], table: dict, looks: list[dict],
             right: dict | None, drifted: dict | None, validity: Completeness, golden: goldens.Golden | None, scaled: dict | None = None,
             answers: dict[str, dict | None] | None = None) -> dict[str, Any]:
    """The result of a run that got to its comparison; its gates and controls are those of the last of the `looks`, and
    `answers` what the judges of `quality` found: rates, lengths, parting."""
    last = looks[-1] if looks else {"gates": {}, "controls": None}
    return plain({
        "schema_version": RESULT_VERSION, "run": exam.run, "title": exam.title, "status": status, "sentence": sentence, "brief": brief, "stopped_in": None,
        "finished": record["finished"], "platform": record["machine"]["platform"], "questions": questions, "metrics": table, "gates": last["gates"], "looks": looks,
        "accuracy": right, "drift": drifted, "answers": answers or {}, "controls": last["controls"], "validity": asdict(validity), "load_s": record["load_s"], "scaling": scaled,
        "subject": record["subject"], "params": record["params"],
        "golden": golden and golden.model_dump(mode="json", include={"blessing", "anchor", "history"}) | {"recorded": golden.recorded}})
