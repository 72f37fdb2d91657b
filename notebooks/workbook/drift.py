"""Drift: how far the log-probabilities of fixed token sequences moved from the golden's, and where greedy answers part from them.

The log-probabilities of both sides are taken by prefill (teacher forcing), so that sampling and batching do not come in:
they see weights, kernels and precision. Greedy answers see the decode steps too.
"""
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

if TYPE_CHECKING:
    from workbook.goldens import Golden, Sequence

OWN = "own"
"""In the place of a golden's file: a run is to read its own answers, as the first session of a new golden."""
SEQUENCES = 16
"""How many of a run's answers a golden keeps."""
SEQUENCE_TOKENS = 256
"""How many tokens of each."""
TOLERANCE = 0.05
"""Limit, in nats, of the 99th percentile over sequences of the mean absolute difference."""
NOISE = 3
"""Where the golden's own sessions read their sequences less alike, that many times what they differed by."""
NOISIEST = 0.1
"""The most, in nats, that a golden's own sessions may differ by: with a limit of three times as much nearly anything would pass."""
ALPHA = 0.01
"""The p below which greedy answers part from the golden's more often than its own sessions did."""


@dataclass(frozen=True)
class Drift:
    """Per-sequence mean |difference of log p| in nats: mean over sequences and 99th percentile."""
    status: str
    mean: float
    p99: float
    tolerance: float


def sequences(golden: "Golden | None", generations: pd.DataFrame, longest: int) -> list[dict[str, list[int]]]:
    """The token sequences to ask about: the golden's, else the run's own first answers, one a prompt.

    Args:
        longest: the engine's window in tokens.

    Returns:
        Dicts of prompt_token_ids and token_ids; these cut where the window is too small for all of them.
    """
    # Cut, since vLLM takes no prompt as long as its window, and asking for the next token is part of reading one.
    if golden and golden.sequences:
        return [{"prompt_token_ids": s.prompt_token_ids, "token_ids": s.token_ids[:max(longest - len(s.prompt_token_ids) - 1, 0)]} for s in golden.sequences]
    room = longest - generations.prompt_token_ids.str.len() - 1
    own = generations[(generations["sample"] == 0) & (generations.token_ids.str.len() > 0) & (room > 0)].head(SEQUENCES)
    return [{"prompt_token_ids": list(map(int, p)), "token_ids": list(map(int, a[:SEQUENCE_TOKENS]))[: longest - len(p) - 1]}
            for p, a in zip(own.prompt_token_ids, own.token_ids, strict=True)]


def same(one: "list[Sequence]", other: "list[Sequence] | list[dict[str, Any]]") -> bool:
    """Whether two lists of sequences are of the same tokens; the other may be as `sequences` gives them, and so cut."""
    if len(one) != len(other):
        return False
    given = [(s["prompt_token_ids"], s["token_ids"], len(s["token_ids"])) if isinstance(s, dict) else (s.prompt_token_ids, s.token_ids, None) for s in other]
    return all((s.prompt_token_ids, s.token_ids[:kept]) == (prompt, ids) for s, (prompt, ids, kept) in zip(one, given, strict=True))


def tolerance(golden: "Golden") -> float:
    """Limit of `Drift.p99` under a golden, nats."""
    return max(TOLERANCE, NOISE * max(golden.self_drift, default=0.0))


def compare(golden: list[list[float]], new: list[list[float]], tolerance: float = TOLERANCE) -> Drift:
    """Compare the log-probabilities of the same sequences, one list of numbers (or None: not finite) a sequence. A new one may be cut
    (`sequences`), and counts as far as it goes; one of which nothing is left does not.

    Raises:
        ValueError: the sequences do not match in number, a new one is longer, or nothing is left of any.
    """
    if len(golden) != len(new) or any(len(n) > len(g) for g, n in zip(golden, new, strict=True)) or not any(map(len, new)):
        raise ValueError("golden and new log-probabilities are not of the same sequences")
    each = np.array([np.abs(np.asarray(g[:len(n)], dtype=float) - np.asarray(n, dtype=float)).mean() for g, n in zip(golden, new, strict=True) if len(n)])
    p99 = float(np.percentile(each, 99))
    # Written so that NaN regresses: a model that answers with NaN is not within any tolerance.
    return Drift("PASSED" if p99 <= tolerance else "REGRESSED", float(each.mean()), p99, tolerance)


def parted(sequences: list[dict[str, Any]], generations: pd.DataFrame) -> tuple[int, int] | None:
    """How many greedy answers part from the sequences of the same prompts, and the tokens read until then, of all of
    them together; None where no answer's tokens are known (a server may not return them)."""
    own = {tuple(prompt): ids for prompt, ids in zip(generations.prompt_token_ids, generations.token_ids, strict=True) if len(ids)}
    pairs = [(np.asarray(s["token_ids"]), np.asarray(own[key])) for s in sequences if (key := tuple(s["prompt_token_ids"])) in own]
    count = tokens = 0
    for golden, new in pairs:
        both = min(len(golden), len(new))
        differing = np.flatnonzero(golden[:both] != new[:both])
        # An answer that ends early parts from the golden's at its end; a golden's may be kept in part only.
        apart = len(differing) > 0 or len(new) < len(golden)
        count, tokens = count + apart, tokens + (int(differing[0]) + 1 if len(differing) else both)
    return (count, tokens) if pairs else None


def parts_more(golden: tuple[int, int], new: tuple[int, int]) -> float:
    """Probability of so many partings in the new answers if they came as rarely, a token, as in the golden's sessions:
    the exact conditional test of two Poisson rates (Przyborowski and Wilenski, Biometrika 31, 1940), one-sided."""
    total = golden[0] + new[0]
    return float(stats.binomtest(new[0], total, new[1] / (golden[1] + new[1]), alternative="greater").pvalue) if total else 1.0
