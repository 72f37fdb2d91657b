"""Accuracy: how many answers are right, how sure that is, and whether it fell on the same questions."""
import math
from dataclasses import dataclass

import numpy as np
from scipy import signal, special, stats

SMALLEST_DROP = 0.01
"""A fall of less than a point is none."""
ALPHA, ALPHA_SAMPLED = 0.05, 0.01
"""The p below which a fall counts, at one sample a question and at several. Greedy answers flip seldom, so that noise
seldom makes a point and .05 is safe; samples are drawn anew, and one run in twenty would be a false alarm."""


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers with its Wilson interval at 95 %, and the share of questions that k samples solve.

    Attributes:
        worth: the independent answers that would give as narrow an interval; samples of one question are not independent.
        pass_at: pass@1 to pass@n.
    """
    value: float
    low: float
    high: float
    answers: int
    questions: int
    worth: float
    pass_at: list[float]

    @property
    def sentence(self) -> str:
        """All of it in words."""
        worth = f", worth {self.worth:,.0f} independent ones" if self.worth < 0.95 * self.answers else ""
        chances = f"; pass@{len(self.pass_at)} {self.pass_at[-1]:.1%}" if len(self.pass_at) > 1 else ""
        return f"{self.value:.1%} right (95 % interval {self.low:.1%} to {self.high:.1%}, {self.answers:,} answers to {self.questions:,} questions{worth}){chances}"


@dataclass(frozen=True)
class Drop:
    """Change on the same questions; `drop` is positive where the new answers are worse."""
    status: str
    drop: float
    p: float
    sentence: str


def estimate(correct: np.ndarray) -> Accuracy:
    """Accuracy of a (questions, samples) array of booleans.

    The interval is Wilson's (1927) for as many independent answers as the spread over questions is worth (Kish's
    effective sample size): at one sample a question, their number; more samples of the same questions narrow it as far
    as they differ.
    """
    means, share, answers, questions = correct.mean(axis=1), float(correct.mean()), correct.size, len(correct)
    variance = float(means.var()) / questions
    worth = min(answers, share * (1 - share) / variance) if variance else float(answers if 0 < share < 1 else questions)
    low, high = wilson(share, worth)
    return Accuracy(share, low, high, answers, questions, worth, pass_at(correct))


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's interval at 95 % of a share of `count` independent answers, which need not be a whole number."""
    z = float(stats.norm.ppf(0.975))
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at(correct: np.ndarray) -> list[float]:
    """pass@k for k = 1 to n: the mean over questions of 1 - C(n - c, k) / C(n, k), c of n samples being right; without
    bias, as in Chen et al. 2021, "Evaluating Large Language Models Trained on Code"."""
    n, wrong = correct.shape[1], (~correct).sum(axis=1)
    return [float(np.mean(1 - special.comb(wrong, k) / special.comb(n, k))) for k in range(1, n + 1)]


def compare(golden: np.ndarray, new: np.ndarray) -> Drop:
    """Did accuracy fall? Exact one-sided McNemar at n = 1, exact one-sided sign-flip permutation of the per-question
    means at n > 1; a fall counts at p < `ALPHA` or `ALPHA_SAMPLED` and a point or more.

    It gates where there are questions enough: where answers that are all wrong would be such a fall.

    Args:
        golden, new: right or wrong, arrays of shape (questions, samples), the same questions in order.
    """
    before, after = golden.mean(axis=1), new.mean(axis=1)
    drop = float(before.mean() - after.mean())
    single = golden.shape[1] == new.shape[1] == 1
    alpha = ALPHA if single else ALPHA_SAMPLED
    p, lowest = (_chance(golden, other, single) for other in (new, np.zeros_like(new)))
    sentence = f"{0.0 - drop * 100:+.1f} points on the same {len(before):,} questions (p = {p:.3f})"
    if before.mean() < SMALLEST_DROP or lowest >= alpha:
        return Drop("PASSED", drop, p, f"{sentence}; not gated: with {before.mean():.0%} right in the golden, so few questions cannot show a fall")
    return Drop("REGRESSED" if p < alpha and drop >= SMALLEST_DROP else "PASSED", drop, p, sentence)


def _chance(golden: np.ndarray, new: np.ndarray, single: bool) -> float:
    """Probability of a fall as large as this by chance."""
    if single:
        return _mcnemar(golden[:, 0], new[:, 0])
    return sign_flip(differences(golden.sum(axis=1), golden.shape[1], new.sum(axis=1), new.shape[1]))


def _mcnemar(golden: np.ndarray, new: np.ndarray) -> float:
    lost, gained = int((golden & ~new).sum()), int((~golden & new).sum())
    return float(stats.binomtest(lost, lost + gained, alternative="greater").pvalue) if lost + gained else 1.0


def differences(before: np.ndarray, of_before: int, after: np.ndarray, of_after: int) -> np.ndarray:
    """Each question's fall, in whole numbers: of counts of so many samples each, scaled to as many on both sides."""
    scale = math.lcm(of_before, of_after)
    return before * (scale // of_before) - after * (scale // of_after)


def sign_flip(lost: np.ndarray) -> float:
    """Probability of a fall of the mean as large as this if each question's difference were as likely to have the other
    sign (Fisher's randomisation test), exact: the differences are whole numbers, those of one size flip as
    a binomial, and the sum over sizes is a convolution."""
    sizes, counts = np.unique(np.abs(lost[lost != 0]), return_counts=True)
    chances = np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        positive = np.zeros(size * count + 1)  # by the sum of the positive ones
        positive[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = signal.convolve(chances, positive)
    return float(np.clip(chances[lost[lost > 0].sum():].sum(), 0.0, 1.0))  # the convolution rounds
