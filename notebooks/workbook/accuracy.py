"""Accuracy: how many answers are right, how sure that is, and whether it fell on the same questions."""
from dataclasses import dataclass

import numpy as np
from scipy import stats

LOWEST, HIGHEST = 0.20, 0.80
"""Accuracy of the golden between which a change can show in either direction, and so may gate."""
ALPHA, SMALLEST_DROP = 0.05, 0.01


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers with its Wilson interval at 95 % over all answers, and pass@n over questions."""
    value: float
    low: float
    high: float
    answers: int
    questions: int
    pass_at_n: float


@dataclass(frozen=True)
class Drop:
    """Change on the same questions; `drop` is positive where the new answers are worse."""
    status: str
    drop: float
    p: float
    sentence: str


def estimate(correct: np.ndarray) -> Accuracy:
    """Accuracy of a (questions, samples) array of booleans."""
    right, total = int(correct.sum()), correct.size
    interval = stats.binomtest(right, total).proportion_ci(method="wilson")
    return Accuracy(right / total, float(interval.low), float(interval.high), total, len(correct), float(correct.any(axis=1).mean()))


def compare(golden: np.ndarray, new: np.ndarray) -> Drop:
    """Did accuracy fall? Exact one-sided McNemar at n = 1, sign-flip permutation of the per-question
    means at n > 1; a fall counts at p < .05 and a point or more.

    Args:
        golden, new: right or wrong, arrays of shape (questions, samples), the same questions in order.
    """
    before, after = golden.mean(axis=1), new.mean(axis=1)
    drop = float(before.mean() - after.mean())
    p = _mcnemar(golden[:, 0], new[:, 0]) if golden.shape[1] == new.shape[1] == 1 else _sign_flip(before, after)
    if not LOWEST <= before.mean() <= HIGHEST:
        sentence = f"not gated: the golden's accuracy {before.mean():.0%} is outside {LOWEST:.0%} to {HIGHEST:.0%}, where a change shows"
        return Drop("PASSED", drop, p, sentence)
    worse = p < ALPHA and drop >= SMALLEST_DROP
    return Drop("REGRESSED" if worse else "PASSED", drop, p,
                f"{0.0 - drop * 100:+.1f} points on the same {len(before)} questions (p = {p:.3f})")


def _mcnemar(golden: np.ndarray, new: np.ndarray) -> float:
    lost, gained = int((golden & ~new).sum()), int((~golden & new).sum())
    return float(stats.binomtest(lost, lost + gained, alternative="greater").pvalue) if lost + gained else 1.0


def _sign_flip(before: np.ndarray, after: np.ndarray) -> float:
    difference = before - after
    if not difference.any():
        return 1.0
    test = stats.permutation_test((difference,), np.mean, permutation_type="samples", alternative="greater",
                                  n_resamples=9999, rng=np.random.default_rng(0))
    return float(test.pvalue)
