"""Validity: did every answer arrive? Comes before any comparison."""
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from workbook.params import Exam

FINISHED = ("stop", "length")
"""Finish reasons of an answer that the engine completed."""


@dataclass(frozen=True)
class Completeness:
    """What came back of what was asked.

    Attributes:
        expected, arrived: answers, prompts x n x repetitions (in a sweep, of every point).
        empty: share of answers without a visible character.
        cut_off: share stopped by `max_tokens` (of no meaning under `ignore_eos`).
        problems: sentences, each of which makes the run INVALID.
        unknown: what could not be checked, a sentence; else empty.
    """
    expected: int
    arrived: int
    empty: float
    cut_off: float
    problems: list[str]
    unknown: str = ""


def check(exam: Exam, requests: pd.DataFrame, generations: pd.DataFrame, *, weights: str, cached: float | None,
          logprobs: Sequence[Sequence[float | None]] = (), worthless: Sequence[str] = (), behind: Sequence[str] = (), disturbed: Sequence[str] = (), lacking: Sequence[str] = ()) -> Completeness:
    """Check a session's rows against what the exam asked for.

    Args:
        requests, generations: `requests.parquet` and `generations.parquet`.
        weights: hash of the weights that were loaded.
        cached: prompt tokens served by the prefix cache or a KV connector while measuring; None where it is not known.
        logprobs: log-probabilities of fixed sequences, None where they are not finite.
        worthless: sentences on answers or weights that are worth nothing (`degeneration.problems`, `canary.problems`).
        behind: sentences of a load generator that fell behind its own schedule.
        disturbed: sentences of what disturbed the accelerators while measuring (`telemetry.disturbances`).
        lacking: gated metrics that were not measured in every repetition.
    """
    expected = exam.requests_a_repetition * exam.repetitions
    # An endpoint may not count the end-of-sequence token, and then an empty answer has none; vLLM counts it.
    ended = (requests.output_tokens > 0) | requests.last_token_s.notna() & (exam.engine == "endpoint")
    done = requests[requests.finish_reason.isin(FINISHED) & ended]
    problems = []
    missing = expected - len(done.drop_duplicates(["session", "repetition", "point", "prompt_id", "sample"]))
    if missing:
        reasons = Counter(requests.finish_reason) - Counter(done.finish_reason)
        said = "; ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common(3)) or "no row"
        problems.append(f"{missing:,} of {expected:,} answers are missing or failed ({said})")
    if len(requests) > expected:
        problems.append(f"{len(requests) - expected} answers more than the {expected} that were asked for")
    if len(generations) != exam.num_prompts * exam.n:
        problems.append(f"generations.parquet has {len(generations)} rows; expected {exam.num_prompts * exam.n}")
    if done[["first_token_s", "last_token_s"]].isna().any(axis=None):
        problems.append("the engine gave no times for some requests")
    problems += dict.fromkeys([*behind, *disturbed])
    problems += [f"{name} is gated and could not be measured" for name in lacking]
    replicas = expected_replicas(exam)
    if _reaches_all(exam, replicas) and (idle := sorted(set(range(replicas)) - set(done.replica))):
        problems.append(f"{_which(idle)} of {replicas} answered nothing: it is dead, or no request reaches it")
    if exam.ignore_eos and len(short := done[done.output_tokens != done.max_tokens]):
        problems.append(f"{len(short)} answers are shorter than asked for although end-of-sequence is ignored (is max_model_len too small?)")
    if len(early := requests[(requests.finish_reason == "length") & (requests.output_tokens < requests.max_tokens)]) and not exam.ignore_eos:
        problems.append(f"{len(early)} answers were cut off before the limit that was asked for (is the engine's window smaller than the exam's?)")
    again = exam.warmup == "auto" or exam.warmup + exam.repetitions > 1 or len(exam.points) > 1
    unknown = "whether the prefix cache fed a pass from the one before is not known: the engine publishes no vllm:prefix_cache_hits" if again and cached is None else ""
    if cached and again:
        problems.append(f"{cached:.0f} prompt tokens came from the prefix cache or a KV connector, so a pass was fed by the one before; expected enable_prefix_caching: false")
    if wrong := sum(value is None for sequence in logprobs for value in sequence):
        problems.append(f"the model gives {wrong} log-probabilities that are not finite numbers")
    problems += worthless
    if exam.weights_sha256 and exam.weights_sha256 != weights:
        problems.append(f"the weights loaded have SHA-256 {weights[:12]}...; key 'weights_sha256' asserts {exam.weights_sha256[:12]}...")
    empty = generations.answer.str.strip().eq("").mean() if len(generations) else 1.0
    return Completeness(expected, len(done), float(empty), float((requests.finish_reason == "length").mean()), problems, unknown)


def expected_replicas(exam: Exam) -> int:
    """How many replicas there are for requests to name: servers, or the data-parallel engines of an `AsyncLLM`."""
    return exam.replicas if exam.engine == "server" else exam.engine_args.get("data_parallel_size", 1) if exam.engine == "async" else 1


def _reaches_all(exam: Exam, replicas: int) -> bool:
    """Whether the load is enough for every replica to get some of it. vLLM's own balancer (engine async) prefers the first of those
    that are as idle, so as many have to be under way at once; the client's takes them in turn."""
    if exam.requests_a_repetition * exam.repetitions < 4 * replicas:
        return False
    return exam.engine != "async" or exam.load not in ("poisson", "gamma") and max(exam.points or exam.concurrency or [exam.num_prompts * exam.n]) >= replicas


def _which(idle: list[int]) -> str:
    return f"replica{'' if len(idle) == 1 else 's'} {', '.join(map(str, idle))}"
