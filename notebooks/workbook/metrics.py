"""Metrics of one repetition, from its rows in `requests.parquet`. Definitions are design's, word for word.

Output tok/s = output tokens / makespan (first scheduled arrival to the last answer in hand).
TTFT = first token - scheduled arrival. TPOT = (last token - first token) / (output tokens - 1).
E2E = last token - scheduled arrival. Per-request tok/s = output tokens / E2E.
Percentiles are taken within a repetition, never over pooled repetitions.
"""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Metric:
    """What a number is: its unit, which way is better, and its definition for the report."""
    unit: str
    direction: str
    definition: str


METRICS = {
    "output_tok_s": Metric("tok/s", "higher", "output tokens / makespan"),
    "total_tok_s": Metric("tok/s", "higher", "(prompt + output tokens) / makespan"),
    "requests_s": Metric("requests/s", "higher", "requests / makespan"),
    "request_tok_s_p50": Metric("tok/s", "higher", "median of output tokens / E2E of a request"),
    "ttft_p50_ms": Metric("ms", "lower", "median time to first token, from the scheduled arrival"),
    "ttft_p99_ms": Metric("ms", "lower", "99th percentile of the time to first token"),
    "tpot_p50_ms": Metric("ms", "lower", "median time per output token after the first"),
    "e2e_p50_ms": Metric("ms", "lower", "median time to the last token, from the scheduled arrival"),
    "e2e_p99_ms": Metric("ms", "lower", "99th percentile of the time to the last token"),
    "queue_p50_ms": Metric("ms", "lower", "median wait for the scheduler, from the scheduled arrival"),
    "makespan_s": Metric("s", "lower", "first scheduled arrival to the last answer in hand"),
    "acceptance_pct": Metric("%", "higher", "accepted / drafted tokens of speculative decoding, where there is any"),
}
THROUGHPUT = "output_tok_s"


def kind(name: str) -> Metric:
    """What a metric is, by its name with or without the point of a sweep (`output_tok_s@32`)."""
    return METRICS[name.partition("@")[0]]


def headline(names: Iterable[str]) -> str:
    """The one throughput to show of a run's metrics: a sweep's is that of its largest point; empty if there is none."""
    found = [name for name in names if name.partition("@")[0] == THROUGHPUT]
    return max(found, key=lambda name: int(name.partition("@")[2] or 0), default="")


def of_repetition(rows: pd.DataFrame) -> dict[str, float]:
    """All metrics of one repetition.

    Args:
        rows: the repetition's rows of `load.requests_frame`.

    Returns:
        One number a metric; NaN where the engine gave no times.
    """
    makespan = rows.finished_s.max() - rows.arrival_s.min()
    e2e = rows.last_token_s - rows.arrival_s
    ttft = rows.first_token_s - rows.arrival_s
    several = rows.output_tokens > 1
    tpot = (rows.last_token_s - rows.first_token_s)[several] / (rows.output_tokens[several] - 1)
    return {
        "output_tok_s": rows.output_tokens.sum() / makespan,
        "total_tok_s": (rows.prompt_tokens.sum() + rows.output_tokens.sum()) / makespan,
        "requests_s": len(rows) / makespan,
        "request_tok_s_p50": _percentile(rows.output_tokens / e2e, 50),
        "ttft_p50_ms": _percentile(ttft, 50) * 1e3,
        "ttft_p99_ms": _percentile(ttft, 99) * 1e3,
        "tpot_p50_ms": _percentile(tpot, 50) * 1e3,
        "e2e_p50_ms": _percentile(e2e, 50) * 1e3,
        "e2e_p99_ms": _percentile(e2e, 99) * 1e3,
        "queue_p50_ms": _percentile(rows.scheduled_s - rows.arrival_s, 50) * 1e3,
        "makespan_s": makespan,
    }


def by_repetition(requests: pd.DataFrame, passes: Sequence[dict[str, Any]] = ()) -> pd.DataFrame:
    """Metrics of every repetition: a row each, indexed by (session, repetition); a sweep has a column for each
    metric and point.

    Args:
        requests: rows of `load.requests_frame`.
        passes: what a run's record has of each pass: session, repetition, point and the growth of the engine's counters.
    """
    rows: dict[tuple[int, int], dict[str, float]] = {}
    for (session, repetition, point), group in requests.groupby(["session", "repetition", "point"]):
        rows.setdefault((session, repetition), {}).update(_at(point, of_repetition(group)))
    for p in passes:
        rows[p["session"], p["repetition"]].update(_at(p["point"], _of_counters(p["counters"])))
    return pd.DataFrame(rows).T.rename_axis(["session", "repetition"])


def sessions(by_repetition: pd.DataFrame, name: str) -> list[list[float]]:
    """A metric's samples, a list for each session; empty if it was not measured."""
    return [list(group) for _, group in by_repetition[name].groupby(level="session")] if name in by_repetition else []


def _at(point: int, values: dict[str, float]) -> dict[str, float]:
    return {f"{name}@{point}": value for name, value in values.items()} if point else values


def _of_counters(growth: dict[str, float]) -> dict[str, float]:
    drafted = growth.get("vllm:spec_decode_num_draft_tokens", 0)
    return {"acceptance_pct": 100 * growth.get("vllm:spec_decode_num_accepted_tokens", 0) / drafted} if drafted else {}


def table(by_repetition: pd.DataFrame) -> pd.DataFrame:
    """For reading: a row per metric with its unit, a column per repetition, and the definition."""
    values = {f"repetition {number}": by_repetition.loc[(session, number)].to_numpy() for session, number in by_repetition.index}
    return pd.DataFrame({"metric": by_repetition.columns, "unit": [kind(m).unit for m in by_repetition], **values,
                         "definition": [kind(m).definition for m in by_repetition]})


def _percentile(values: pd.Series, q: float) -> float:
    return float(np.percentile(values, q)) if len(values) else float("nan")
