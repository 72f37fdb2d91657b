"""Metrics of one repetition, from its rows in `requests.parquet`. Definitions are design's, word for word.

Output tok/s = output tokens / makespan (first scheduled arrival to the last answer in hand).
TTFT = first token - scheduled arrival. TPOT = (last token - first token) / (output tokens - 1).
E2E = last token - scheduled arrival. ITL = gaps between streamed tokens. Per-request tok/s = output tokens / E2E.
Percentiles are taken within a repetition, never over pooled repetitions.
"""
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from workbook.params import Slo


@dataclass(frozen=True)
class Metric:
    """What a number is: its unit, which way is better, and its definition for the report; `once`: a session has
    one sample of it, and not one a repetition."""
    unit: str
    direction: str
    definition: str
    once: bool = False


PERCENTILES = (50, 90, 95, 99)
TIMES = {
    "ttft": "time to first token, from the scheduled arrival",
    "tpot": "time per output token after the first, of a request",
    "itl": "gap between two chunks of a stream, as the client saw it",
    "e2e": "time to the last token, from the scheduled arrival",
    "queue": "wait for the scheduler, from the scheduled arrival",
}
PROCESSES = {
    "front_end": "API server of vLLM's (requests in, answers out)",
    "engine_core": "engine core of vLLM's (the scheduler; with one GPU an engine also its launches)",
    "worker": "worker of vLLM's (the launches, with several GPUs an engine)",
}
METRICS = {
    "output_tok_s": Metric("tok/s", "higher", "output tokens / makespan"),
    "output_tok_s_per_accelerator": Metric("tok/s", "higher", "output tokens / makespan / accelerators"),
    "plateau_tok_s": Metric("tok/s", "higher", "half of the output tokens / the time in which the middle half of them came: without ramp and tail"),
    "total_tok_s": Metric("tok/s", "higher", "(prompt + output tokens) / makespan"),
    "requests_s": Metric("requests/s", "higher", "requests / makespan"),
    "goodput_s": Metric("requests/s", "higher", "requests within every limit of `slo` / makespan"),
    "request_tok_s_p50": Metric("tok/s", "higher", "median of output tokens / E2E of a request"),
    **{f"{name}_p{q}_ms": Metric("ms", "lower", f"{'median' if q == 50 else f'{q}th percentile'} of the {what}") for name, what in TIMES.items() for q in PERCENTILES},
    "outside_engine_pct": Metric("%", "lower", "of the requests' time from the scheduled arrival to the last token, what they were not in the engine: with the client, on the way, in a server's front end"),
    "makespan_s": Metric("s", "lower", "first scheduled arrival to the last answer in hand; the connections of a batch, or that a closed loop begins with, are open before it"),
    "straggler_pct": Metric("%", "lower", "of the time to the last token of all, how long the replicas on average had nothing left to do; where there are several"),
    "acceptance_pct": Metric("%", "higher", "accepted / drafted tokens of speculative decoding, where there is any"),
    "preemptions": Metric("requests", "lower", "times a running request was put back for want of KV cache"),
    "bandwidth_roof_pct": Metric("%", "higher", "vLLM's estimate of bytes read and written / makespan / accelerators / the bandwidth measured on this machine"),
    "compute_roof_pct": Metric("%", "higher", "vLLM's estimate of FLOPs / makespan / accelerators / the matrix rate measured on this machine (bf16; of a CPU without it float32)"),
    "prefix_hit_pct": Metric("%", "higher", "prompt tokens found in the prefix cache or by a KV connector, where there is one"),
    "kv_cache_peak_pct": Metric("%", "lower", "largest share of the KV cache in use at the end of a step, in any engine (a server is asked every two seconds)"),
    "memory_peak_gb": Metric("GB", "lower", "most memory in use on any one of the GPUs; without a GPU, resident in the process tree; sampled twice a second"),
    "energy_j_per_token": Metric("J/token", "lower", "energy of all GPUs in use over the makespan / output tokens, where NVML gives energy or power"),
    "client_cpu_pct": Metric("%", "lower", "of one core, what the process that sends the requests and takes the answers used (with engine async: vLLM's front end too)"),
    "others_cpu_pct": Metric("%", "lower", "of the cores, what processes other than the load's took, where the CPU is what generates"),
    **{f"{name}_cpu_pct": Metric("%", "lower", f"of one core, what the busiest {what} used, of several the busiest of each half second, where a GPU is what generates") for name, what in PROCESSES.items()},
    "gpu_busy_pct": Metric("%", "higher", "how long a kernel ran on the least busy of the GPUs in use, of the pass without its first second, which NVML's share does not tell from the pause before it"),
    "gpu_clock_mhz": Metric("MHz", "higher", "mean of the SM clocks of all GPUs in use over the pass"),
    "startup_s": Metric("s", "lower", "start of the engine to its being ready, once a session", once=True),
}
THROUGHPUT = "output_tok_s"
OF_MAKESPAN = (THROUGHPUT, "output_tok_s_per_accelerator", "total_tok_s", "requests_s", "makespan_s")
"""Speeds that are the makespan's: what delays a request and not the last one costs them nothing."""
SECONDS = ("vllm:request_queue_time_seconds", "vllm:request_inference_time_seconds")
"""Histograms of a server whose sums say what its requests spent waiting for the scheduler, and after that."""
ANSWERED, COUNTED = "vllm:request_success", 0.95
"""The counter of the requests in these histograms, and how much of a pass must be in them: the last may not be, just after it."""
HITS = ("vllm:prefix_cache_hits", "vllm:external_prefix_cache_hits")
"""Prompt tokens that were not computed: found in vLLM's own cache, and by a KV connector (LMCache and the like)."""
OTHERS, CLIENT, BUSY = "others_cpu_pct", "client_cpu_pct", "gpu_busy_pct"


def kind(name: str) -> Metric:
    """What a metric is, by its name with or without the point of a sweep (`output_tok_s@32`)."""
    return METRICS[name.partition("@")[0]]


def of_makespan(name: str) -> bool:
    """Whether a metric is the speed of the whole load, and not that of a request or of a start."""
    return name.partition("@")[0] in OF_MAKESPAN


def number(value: float | None) -> str:
    """A value to be read: whole and with its thousands apart from 1,000 on, else of four significant digits; a dash for none."""
    return "–" if value is None or math.isnan(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def headline(names: Iterable[str]) -> str:
    """The one throughput to show of a run's metrics: a sweep's is that of its largest point; empty if there is none."""
    found = [name for name in names if name.partition("@")[0] == THROUGHPUT]
    return max(found, key=lambda name: int(name.partition("@")[2] or 0), default="")


def of_repetition(rows: pd.DataFrame, accelerators: int = 1, slo: Slo | None = None) -> dict[str, float]:
    """All metrics of one repetition that its requests give.

    Args:
        rows: the repetition's rows of `load.requests_frame`.
        accelerators: GPUs in use; 1 for a CPU.
        slo: limits for goodput; None or all 0: no goodput.

    Returns:
        One number a metric; NaN where the engine gave no times, and no ITL without a stream.
    """
    makespan = rows.finished_s.max() - rows.arrival_s.min()
    output = rows.output_tokens.sum()
    e2e = rows.last_token_s - rows.arrival_s
    several = rows.output_tokens > 1
    tpot = (rows.last_token_s - rows.first_token_s)[several] / (rows.output_tokens[several] - 1)
    times = {"ttft": rows.first_token_s - rows.arrival_s, "tpot": tpot, "e2e": e2e, "queue": rows.scheduled_s - rows.arrival_s}
    found = {
        "output_tok_s": output / makespan,
        "output_tok_s_per_accelerator": output / makespan / accelerators,
        "plateau_tok_s": plateau(rows),
        "total_tok_s": (rows.prompt_tokens.sum() + output) / makespan,
        "requests_s": len(rows) / makespan,
        "request_tok_s_p50": _percentile(rows.output_tokens / e2e, 50),
        "makespan_s": makespan,
    }
    if rows.replica.nunique() > 1:
        found["straggler_pct"] = straggler(rows)
    found |= {f"{name}_p{q}_ms": _percentile(values, q) * 1e3 for name, values in times.items() for q in PERCENTILES}
    if "itl_ms" in rows and len(gaps := [g for g in rows.itl_ms if g is not None and len(g)]):
        found |= {f"itl_p{q}_ms": _percentile(np.concatenate(gaps), q) for q in PERCENTILES}
    if slo and any(limits := slo.model_dump().values()):
        good = np.ones(len(rows), dtype=bool)
        for limit, values in zip(limits, (times["ttft"], tpot.reindex(rows.index, fill_value=0.0), e2e), strict=True):
            good &= (values <= limit / 1e3).to_numpy() if limit else True
        found["goodput_s"] = good.sum() / makespan
    return found


def plateau(rows: pd.DataFrame) -> float:
    """Output tok/s while the middle half of the output tokens came, tokens/s.

    The tokens of a request count as evenly spread from its first to its last, since only final outputs are
    asked for. A pause at either end of that half is no part of it. NaN where the engine gave no times.
    """
    if not np.isfinite(rows[["first_token_s", "last_token_s"]].to_numpy()).all():
        return float("nan")
    # A request of one token, or whose tokens came at once, still takes a moment: else its rate is infinite.
    start, end = rows.first_token_s.to_numpy(), np.maximum(rows.last_token_s.to_numpy(), rows.first_token_s.to_numpy() + 1e-6)
    rate = rows.output_tokens.to_numpy() / (end - start)
    times = np.concatenate([start, end])
    order = np.argsort(times, kind="stable")
    times, slope = times[order], np.cumsum(np.concatenate([rate, -rate])[order])
    tokens = np.concatenate([[0.0], np.cumsum(slope[:-1] * np.diff(times))])
    # A hair inside the middle half: where the tokens pause at just a quarter, as between two of four equal requests,
    # the pause is on one side of it whatever the last bits of the sums are.
    levels = tokens[-1] * np.array([0.25 + 1e-6, 0.75 - 1e-6])
    (came,), (took,) = np.diff(levels), np.diff(np.interp(levels, np.maximum.accumulate(tokens), times))
    return float(came / took) if took > 0 else float("nan")


def straggler(rows: pd.DataFrame) -> float:
    """How long the replicas of a pass had nothing left to do on average, until the last token of the slowest, as % of the time to
    that token; 0 of one replica. Requests without times count for nothing; NaN where none has any.

    With the same work on each, n replicas that are otherwise as fast as one alone give at most n × (1 - this) of it.
    """
    begin, ends = rows.arrival_s.min(), rows.groupby("replica").last_token_s.max()
    return float(100 * (1 - (ends.mean() - begin) / (ends.max() - begin)))


def last_answer(rows: pd.DataFrame) -> float:
    """How long the answer that ended last was coming, first token to last, as % of the time from the first arrival to that last
    token. Its tokens come one after another: further replicas shorten this only as far as they make each come faster. NaN where no
    request has times."""
    ended = rows[rows.last_token_s.notna()]
    if ended.empty:
        return float("nan")
    last = ended.loc[ended.last_token_s.idxmax()]
    return float(100 * (last.last_token_s - last.first_token_s) / (last.last_token_s - ended.arrival_s.min()))


def outside_engine(rows: pd.DataFrame, growth: dict[str, float]) -> float:
    """`outside_engine_pct` of a pass. NaN where a request has no times, or the engine told those of its scheduler neither of each
    request nor of all together; and where its counters have requests that are not of this load.

    Args:
        rows: as `of_repetition`.
        growth: of the engine's counters over the pass.
    """
    in_all = (rows.last_token_s - rows.arrival_s).mean(skipna=False)
    inside = (rows.last_token_s - rows.queued_s).mean(skipna=False)
    answered = growth.get(ANSWERED, 0)
    if np.isnan(inside) and COUNTED * len(rows) <= answered <= len(rows) and growth.keys() >= set(SECONDS):
        inside = sum(growth[name] for name in SECONDS) / answered
    return float(100 * (1 - inside / in_all))


def by_repetition(requests: pd.DataFrame, passes: Sequence[dict[str, Any]] = (), accelerators: int = 1, slo: Slo | None = None) -> pd.DataFrame:
    """Metrics of every repetition: a row each, indexed by (session, repetition); a sweep has a column for each
    metric and point.

    Args:
        requests: rows of `load.requests_frame`.
        passes: what a run's record has of each pass: session, repetition, point, the growth of the engine's counters, and
            what else was measured of it, by metric.
        accelerators, slo: as `of_repetition`.
    """
    rows: dict[tuple[int, int], dict[str, float]] = {}
    groups = dict(iter(requests.groupby(["session", "repetition", "point"])))
    for (session, repetition, point), group in groups.items():
        rows.setdefault((session, repetition), {}).update(_at(point, of_repetition(group, accelerators, slo)))
    for p in passes:
        of_pass = groups.get((p["session"], p["repetition"], p["point"]))
        outside = {} if of_pass is None else {"outside_engine_pct": outside_engine(of_pass, p["counters"])}
        rows[p["session"], p["repetition"]].update(_at(p["point"], outside | _of_counters(p["counters"]) | p.get("measured", {})))
    return pd.DataFrame(rows).T.rename_axis(["session", "repetition"])


def sessions(by_repetition: pd.DataFrame, name: str) -> list[list[float]]:
    """A metric's samples, a list for each session; empty if it was not measured. A session's one sample of what is
    measured once stands at its first repetition."""
    if name not in by_repetition:
        return []
    groups = [group for _, group in by_repetition[name].groupby(level="session")]
    return [list(group.iloc[:1] if kind(name).once else group) for group in groups]


def lacking(by_repetition: pd.DataFrame, names: Iterable[str]) -> list[str]:
    """Those of some metrics that were not measured in every repetition (or once a session, as they are)."""
    measured = {name: sessions(by_repetition, name) for name in names}
    return [name for name, values in measured.items() if not values or not np.isfinite(np.concatenate(values)).all()]


def table(by_repetition: pd.DataFrame) -> pd.DataFrame:
    """For reading: a row per metric that was measured with its unit, a column per repetition by its number, and the definition. Of a
    sweep a column per point, with medians over the repetitions."""
    points = dict.fromkeys(name.partition("@")[2] for name in by_repetition if "@" in name)
    if points:
        medians, names = by_repetition.median(), dict.fromkeys(name.partition("@")[0] for name in by_repetition)
        # What is measured once a session has no point, and stands in the first column.
        values = {f"at {point}": [medians.get(f"{name}@{point}", medians.get(name) if point == next(iter(points)) else None) for name in names] for point in points}
    else:
        names, values = list(by_repetition), {str(number): by_repetition.loc[(session, number)].to_numpy() for session, number in by_repetition.index}
    rows = pd.DataFrame({"metric": list(names), "unit": [kind(m).unit for m in names], **values, "definition": [kind(m).definition for m in names]})
    return rows.dropna(how="all", subset=list(values)).reset_index(drop=True)


def _at(point: int, values: dict[str, float]) -> dict[str, float]:
    return {f"{name}@{point}" if point and not METRICS[name].once else name: value for name, value in values.items()}


def _of_counters(growth: dict[str, float]) -> dict[str, float]:
    found = {"preemptions": growth["vllm:num_preemptions"]} if "vllm:num_preemptions" in growth else {}
    for name, part, whole in (("acceptance_pct", "spec_decode_num_accepted_tokens", "spec_decode_num_draft_tokens"),
                              ("prefix_hit_pct", "prefix_cache_hits", "prefix_cache_queries")):
        # A KV connector is asked for what vLLM's own cache has not: for all, where that is off.
        if total := growth.get(f"vllm:{whole}", 0) or growth.get(f"vllm:external_{whole}", 0):
            found[name] = 100 * (growth.get(f"vllm:{part}", 0) + growth.get(f"vllm:external_{part}", 0)) / total
    return found


def _percentile(values: pd.Series, q: float) -> float:
    return float(np.percentile(values, q)) if len(values) else float("nan")
