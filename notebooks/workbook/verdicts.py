"""The verdict's rule: is a metric worse than its golden, and how sure is that?"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

PRIOR_SD, PRIOR_SHARE, PRIOR_DF = 0.01, 0.5, 8
"""How much sessions are taken to differ before any is seen: by 1 %, or by half the noise within a session where
that is more; and how much is thought of that guess: as much as of 8 observed degrees of freedom. Three or five
sessions say too little about their own spread. tests/bench/verdict_rates.py prints what follows from the choice."""
ONCE_PRIOR_SD = 0.06
"""PRIOR_SD of what a session has one sample of, its own noise included (seven starts of one engine differed by 6 %)."""
FIRST_LOOK, POOLED, PAIRED = (0.98, 0.98), (0.98, 0.95), (0.95, 0.95)
"""Confidence that there is a loss, for REGRESSED, and that it is below delta, for PASSED: by a single new session, by
more of them, by pairs. The first look asks more for PASSED, which ends the matter there: a session that stands alone
does not show how much its like differ."""


@dataclass(frozen=True)
class Verdict:
    """Outcome for one metric.

    Attributes:
        status: REGRESSED, IMPROVED, PASSED or INCONCLUSIVE.
        effect: difference of the mean logs, positive where the new sessions are worse; about a fraction.
        low, high: bounds of the true effect, each one-sided with the confidence that its use asks for
            (FIRST_LOOK, POOLED, PAIRED).
        smallest_visible: the tolerance applied, which is the smallest effect that would have been called
            REGRESSED: the margin, or what the noise asks for where that is more.
        confidence: of the interval from low to high.
        noise: standard deviation, as estimated, of the mean of one new session (of one pair's difference).
    """
    status: str
    effect: float
    low: float
    high: float
    smallest_visible: float
    confidence: float
    noise: float


class Side(NamedTuple):
    """What the rule needs of one side: logs of S sessions. Leading axes, if any, are trials of a simulation."""
    means: np.ndarray    # of each session, shape (..., S), higher is better
    squares: np.ndarray  # squared distances of samples from their session's mean, summed over all sessions, shape (...)
    sizes: np.ndarray    # samples of each session, shape (S,)


def judge(golden_sessions: list[list[float]], new_sessions: list[list[float]], *, direction: str,
          delta: float = 0.05, margin: float = 0.03, prior_sd: float = PRIOR_SD, confidences: tuple[float, float] | None = None) -> Verdict:
    """Compare a metric's samples with its golden's, session by session.

    In logs: d = mean of the golden's S_g session means - mean of the S_n new ones (sign turned for "lower").
    A session's mean varies by what differs between sessions and by what is left of its n_j samples' noise. With
    s^2 the variance within sessions, pooled over all, the variance of a session's mean is expected to be

        v_j = max(prior_sd, PRIOR_SHARE s)^2 + s^2 / n_j

    and, once f = S_g + S_n - 2 degrees of freedom of session means have been seen, r v_j with

        r = (PRIOR_DF + sum over sessions of (m_j - mean of its side)^2 / v) / (PRIOR_DF + f),

    v the mean of the v_j in that sum: the posterior scale under a scaled inverse chi-squared prior on a normal
    variance (Gelman et al., Bayesian Data Analysis, 3rd ed., 2.6; as in the moderated t of Smyth, Stat. Appl.
    Genet. Mol. Biol. 3(1), 2004). Then d has Student's t with PRIOR_DF + f degrees of freedom around the true
    loss, se^2 = r (mean_g(v_j) / S_g + mean_n(v_j) / S_n), low and high = d -+ t se, and the first that holds of

        REGRESSED     d > max(margin, t se): beyond the margin, and beyond what noise explains (low > 0);
        IMPROVED      high < -margin;
        PASSED        high < delta: a loss of delta is ruled out;
        INCONCLUSIVE  otherwise: a loss is neither shown nor ruled out.

    The confidence of t is FIRST_LOOK with one new session, else POOLED; or `confidences`, where several are judged at once.

    Args:
        golden_sessions, new_sessions: a list of samples for each engine session; positive numbers.
        direction: "higher" or "lower", whichever is better.
        delta: the loss that must be ruled out for PASSED, as a fraction of the speed: a time that is
            1 / (1 - delta) times as long is such a loss too.
        margin: the loss up to which a difference is not called one, likewise.
        prior_sd: how much sessions are taken to differ before any is seen, in logs.

    Raises:
        ValueError: no samples, or one that is not a positive number; unknown direction.
    """
    sides = (_side(golden_sessions, "golden", direction), _side(new_sessions, "new", direction))
    return _verdict(*compare(*sides, delta, margin, prior_sd, confidences))


def compare(golden: Side, new: Side, delta: float, margin: float, prior_sd: float = PRIOR_SD, confidences: tuple[float, float] | None = None) -> tuple:
    """`judge` for sides, or for arrays of them: the fields of a Verdict."""
    sides = (golden, new)
    within = (golden.squares + new.squares) / max(sum(np.sum(s.sizes - 1) for s in sides), 1)
    between = np.maximum(prior_sd**2, PRIOR_SHARE**2 * within)
    expected = [between + within * np.mean(1 / s.sizes) for s in sides]
    freedom = [s.sizes.size - 1 for s in sides]
    typical = sum(f * v for f, v in zip(freedom, expected)) / sum(freedom) if sum(freedom) else expected[0]
    seen = sum(((s.means - s.means.mean(-1, keepdims=True)) ** 2).sum(-1) for s in sides)
    df = PRIOR_DF + sum(freedom)
    ratio = (PRIOR_DF + seen / typical) / df
    error = np.sqrt(ratio * sum(v / s.sizes.size for s, v in zip(sides, expected)))
    effect = golden.means.mean(-1) - new.means.mean(-1)
    return *_decide(effect, error, df, confidences or (POOLED if freedom[1] else FIRST_LOOK), delta, margin), np.sqrt(ratio * expected[1])


def visible(golden_sessions: list[list[float]], repetitions: int, prior_sd: float = PRIOR_SD) -> float:
    """The smallest loss, as a fraction of the speed, that `judge` would tell from noise in one new session of so many
    repetitions, if it were like the golden's: t se with the golden's own noise, whatever the margin.

    Raises:
        ValueError: as `judge`.
    """
    golden = _side(golden_sessions, "golden", "higher")
    within = golden.squares / max(np.sum(golden.sizes - 1), 1)
    new = Side(golden.means.mean(keepdims=True), within * (repetitions - 1), np.array([repetitions]))
    return -math.expm1(-_verdict(*compare(golden, new, 0.5, 0.0, prior_sd)).smallest_visible)


def judge_pairs(a: list[list[float]], b: list[list[float]], *, direction: str,
                delta: float = 0.03, margin: float = 0.02) -> Verdict:
    """Compare two variants that took turns on one machine, A B B A and again: is b worse than a?

    In logs, a pair's difference is the mean of its a samples - the mean of its b samples (sign turned for
    "lower"), d the mean over pairs, and low and high are d -+ t se: the paired t test, one-sided (Student,
    Biometrika 6(1), 1908). The statuses are those of `judge`, so that REGRESSED is d > margin and p < .05.
    What drifts evenly over the experiment cancels in d if every other pair starts with b and their number is even.

    Args:
        a, b: for each pair its samples of the one and of the other; positive numbers.

    Raises:
        ValueError: as `judge`; fewer than two pairs, or not as many of a as of b.
    """
    return _verdict(*compare_pairs(pair_differences(a, b, direction=direction), delta, margin))


def pair_differences(a: list[list[float]], b: list[list[float]], *, direction: str) -> np.ndarray:
    """The differences that `judge_pairs` judges, one a pair, in logs, positive where b is worse; raises as it does."""
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} of a and {len(b)} of b; expected two pairs or more")
    return _side(a, "a", direction).means - _side(b, "b", direction).means


def compare_pairs(differences: np.ndarray, delta: float, margin: float) -> tuple:
    """`judge_pairs` for differences of pairs, along the last axis: the fields of a Verdict."""
    error, df = stats.sem(differences, axis=-1), differences.shape[-1] - 1
    return *_decide(differences.mean(-1), error, df, PAIRED, delta, margin), differences.std(-1, ddof=1)


def _decide(effect, error, df: int, confidences: tuple[float, float], delta: float, margin: float) -> tuple:
    """The first statuses that hold; delta and margin are fractions of the speed, all else is in logs."""
    delta, margin = -math.log1p(-delta), -math.log1p(-margin)
    above, below = (error * t for t in stats.t.ppf(confidences, df))
    tolerance, high = np.maximum(margin, above), effect + below
    status = np.select([effect > tolerance, high < -margin, high < delta], ["REGRESSED", "IMPROVED", "PASSED"], "INCONCLUSIVE")
    return status, effect, effect - above, high, tolerance, sum(confidences) - 1


def _verdict(status: np.ndarray, *numbers: float) -> Verdict:
    return Verdict(str(status), *(float(x) for x in numbers))


def _side(sessions: list[list[float]], which: str, direction: str) -> Side:
    if direction not in ("higher", "lower"):
        raise ValueError(f"direction is {direction!r}; expected 'higher' or 'lower'")
    arrays = [np.asarray(s, dtype=float) for s in sessions]
    if not arrays or any(a.size == 0 for a in arrays):
        raise ValueError(f"the {which} side has no samples, or a session without any")
    if any(not np.all(np.isfinite(a) & (a > 0)) for a in arrays):
        raise ValueError(f"the {which} side has a sample that is not a positive number: {sessions}")
    logs = [np.log(a) if direction == "higher" else -np.log(a) for a in arrays]
    return Side(np.array([x.mean() for x in logs]), np.array(sum(x.var() * x.size for x in logs)), np.array([x.size for x in logs]))


def change(effect: float, direction: str) -> float:
    """Change of the metric itself, as a fraction of the golden, for an effect in logs."""
    return math.expm1(-effect if direction == "higher" else effect)
