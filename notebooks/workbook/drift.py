"""Drift: how far the log-probabilities of fixed token sequences moved from the golden's.

Both sides are taken by prefill (teacher forcing), so that sampling and batching do not come in.
"""
from dataclasses import dataclass

import numpy as np
import pandas as pd

from workbook.goldens import Golden

SEQUENCES = 16
"""How many of a run's answers a golden keeps."""
SEQUENCE_TOKENS = 256
"""How many tokens of each."""
TOLERANCE = 0.05
"""Limit, in nats, of the 99th percentile over sequences of the mean absolute difference."""


@dataclass(frozen=True)
class Drift:
    """Per-sequence mean |difference of log p| in nats: mean over sequences and 99th percentile."""
    status: str
    mean: float
    p99: float
    tolerance: float


def sequences(golden: Golden | None, generations: pd.DataFrame, longest: int) -> list[dict[str, list[int]]]:
    """The token sequences to ask about: the golden's, else the run's own first answers, one a prompt.

    Args:
        longest: the engine's window in tokens.

    Returns:
        Dicts of prompt_token_ids and token_ids.
    """
    if golden and golden.sequences:
        return [{"prompt_token_ids": s.prompt_token_ids, "token_ids": s.token_ids} for s in golden.sequences]
    # Cut, since vLLM takes no prompt as long as its window, and asking for the next token is part of reading one.
    own = generations[(generations["sample"] == 0) & (generations.token_ids.str.len() > 0)].head(SEQUENCES)
    return [{"prompt_token_ids": list(map(int, p)), "token_ids": list(map(int, a[:SEQUENCE_TOKENS]))[: longest - len(p) - 1]}
            for p, a in zip(own.prompt_token_ids, own.token_ids, strict=True)]


def compare(golden: list[list[float]], new: list[list[float]], tolerance: float = TOLERANCE) -> Drift:
    """Compare the log-probabilities of the same sequences, one list of numbers (or None: not finite) a sequence.

    Raises:
        ValueError: the sequences do not match in number or length.
    """
    if [len(s) for s in golden] != [len(s) for s in new]:
        raise ValueError("golden and new log-probabilities are not of the same sequences")
    each = np.array([np.abs(np.asarray(g, dtype=float) - np.asarray(n, dtype=float)).mean() for g, n in zip(golden, new, strict=True)])
    p99 = float(np.percentile(each, 99))
    # Written so that NaN regresses: a model that answers with NaN is not within any tolerance.
    return Drift("PASSED" if p99 <= tolerance else "REGRESSED", float(each.mean()), p99, tolerance)
