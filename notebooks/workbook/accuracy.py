"""Accuracy: how many answers are right, how sure that is, and whether it fell on the same questions."""
import bisect
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy import signal, stats

SMALLEST_DROP = 0.01
"""A fall of less than a point is none."""
ALPHA, ALPHA_SAMPLED = 0.05, 0.01
"""The p below which a fall counts, of greedy answers and of samples. Greedy answers flip seldom, so that noise
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
        chances = f"; pass@{len(self.pass_at)} {self.pass_at[-1] * 100:.1f} %" if len(self.pass_at) > 1 else ""
        return f"{self.value * 100:.1f} % right (95 % interval {self.low * 100:.1f} % to {self.high * 100:.1f} %, {self.answers:,} answers to {self.questions:,} questions{worth}){chances}"


@dataclass(frozen=True)
class Drop:
    """Change on the same questions.

    Attributes:
        drop: fall of the share of right answers, positive where the new ones are worse.
        low, high: bounds of it, each one-sided at the level of the test: what the test could not have told from noise on either side.
        smallest_visible: the smallest fall that would have been called one; None where none would.
    """
    status: str
    drop: float
    p: float
    low: float
    high: float
    smallest_visible: float | None
    sentence: str


def estimate(correct: np.ndarray) -> Accuracy:
    """Accuracy of a (questions, samples) array of booleans.

    The interval is Wilson's (1927) for as many independent answers as the spread over questions is worth (Kish's
    effective sample size): at one sample a question, their number; more samples of the same questions narrow it as far
    as they differ.
    """
    means, share, answers, questions = correct.mean(axis=1), float(correct.mean()), correct.size, len(correct)
    variance = float(means.var()) / questions
    worth = min(answers, share * (1 - share) / variance) if variance else float(answers if 0 < share < 1 and questions > 1 else questions)
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
    n, right = correct.shape[1], correct.sum(axis=1)
    return [float(np.mean(1 - stats.hypergeom.pmf(0, n, right, k))) for k in range(1, n + 1)]


def compare(golden: np.ndarray, new: np.ndarray, *, sampled: bool = False) -> Drop:
    """Did accuracy fall? `sign_flip` of the questions, which at one sample each is McNemar's exact test, one-sided; a fall counts
    at p < `ALPHA` or `ALPHA_SAMPLED` and a point or more.

    It gates where there are questions enough: where answers that are all wrong would be such a fall.

    Args:
        golden, new: right or wrong, arrays of shape (questions, samples), the same questions in order.
        sampled: whether answers are drawn at a temperature; several of a question are in any case.
    """
    before = golden.mean(axis=1)
    drop = round(float(before.mean() - new.mean()), 12)  # of shares, whose difference is a bit more or less than a point that it is
    alpha = ALPHA_SAMPLED if sampled or max(golden.shape[1], new.shape[1]) > 1 else ALPHA
    lost, all_lost = (differences(golden.sum(axis=1), golden.shape[1], other.sum(axis=1), new.shape[1]) for other in (new, np.zeros_like(new)))
    scale = math.lcm(golden.shape[1], new.shape[1])
    p, lowest, noise = sign_flip(lost), sign_flip(all_lost), smallest_fall(lost, scale // new.shape[1], alpha)
    reach = 1.0 if noise is None else noise / (scale * len(lost))
    # No fall is below all answers right, or above all of them wrong.
    low, high, visible = max(drop - reach, float(before.mean()) - 1), min(drop + reach, float(before.mean())), None if noise is None else max(SMALLEST_DROP, reach)
    change = f"{0.0 - drop * 100:+.1f} points on the same {len(before):,} questions"
    if before.mean() < SMALLEST_DROP or lowest >= alpha or visible is None:
        return Drop("PASSED", drop, p, low, high, None, f"{change} (p {_said(p)}); not gated: with {before.mean() * 100:.0f} % right in the golden, so few questions cannot show a fall")
    sentence = (f"{change} ({(1 - 2 * alpha) * 100:.0f} % interval {0.0 - high * 100:+.1f} to {0.0 - low * 100:+.1f}, p {_said(p)}; "
                f"a fall of {visible * 100:.1f} would have been called one)")
    return Drop("REGRESSED" if p < alpha and drop >= SMALLEST_DROP else "PASSED", drop, p, low, high, visible, sentence)


def differences(before: np.ndarray, of_before: int, after: np.ndarray, of_after: int) -> np.ndarray:
    """Each question's fall, in whole numbers: of counts of so many samples each, scaled to as many on both sides."""
    scale = math.lcm(of_before, of_after)
    return before * (scale // of_before) - after * (scale // of_after)


def _said(p: float) -> str:
    return f"= {p:.3f}" if p >= 0.001 else "< 0.001"


def sign_flip(lost: np.ndarray) -> float:
    """Probability of a fall of the mean as large as this if each question's difference were as likely to have the other
    sign (Fisher's randomisation test), exact: the differences are whole numbers, those of one size flip as
    a binomial, and the sum over sizes is a convolution. Where all are of one size it is McNemar's exact test."""
    return _chance(_sizes(lost), int(lost[lost > 0].sum()))


def smallest_fall(lost: np.ndarray, answer: int, alpha: float) -> int | None:
    """The smallest fall of the sum, in the differences' unit, for which `sign_flip` gives p < alpha with differences of these sizes:
    `lost` is called a fall if and only if its sum is as large. Where they are too few for any, all of them and one more answer, which
    is so much of the unit, going wrong in each of some other questions; None where that would not do either."""
    sizes = _sizes(lost)
    total = sum(size * count for size, count in sizes.items())
    if _chance(sizes, total) >= alpha:
        still = range(1, len(lost) - sizes.total() + 1)
        more = bisect.bisect_left(still, True, key=lambda j: _chance(sizes + Counter({answer: j}), total + answer * j) < alpha) + 1
        return total + answer * more if more in still else None
    return 2 * (bisect.bisect_left(range(total), True, key=lambda least: _chance(sizes, least) < alpha)) - total


def _sizes(lost: np.ndarray) -> Counter:
    """How many differences there are of each size but 0."""
    return Counter(np.abs(lost[lost != 0]).tolist())


def _chance(sizes: Counter, least: int) -> float:
    """Probability that those of the differences that come out positive sum to so much or more."""
    chances = np.ones(1)
    for size, count in sizes.items():
        positive = np.zeros(size * count + 1)  # by the sum of the positive ones
        positive[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = signal.convolve(chances, positive)
    return float(np.clip(chances[least:].sum(), 0.0, 1.0))  # the convolution rounds
