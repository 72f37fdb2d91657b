"""The verdict's rule: is a metric worse than its golden, and how sure is that?"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

PRIOR_SD, PRIOR_SHARE, PRIOR_DF = 0.01, 0.5, 6
"""How much sessions are taken to differ before any is seen: by 1 %, or by half the noise within a session where
that is more; and how much is thought of that guess: as much as of 6 observed degrees of freedom."""
WORSE = 0.975
"""Confidence that there is a loss at all, for REGRESSED."""
RULED_OUT = 0.95
"""Confidence that the loss is below delta, for PASSED. With a single new session it is WORSE that counts: PASSED
then ends the comparison, and a session that stands alone cannot show how much its like differ."""
PAIRED = 0.95
"""Confidence of both for pairs, where each difference is observed."""

ORDER = ("INVALID", "REGRESSED", "INCONCLUSIVE", "NO_GOLDEN", "IMPROVED", "PASSED", "SKIPPED", "NOT_RUN")
"""From the status that decides over all others to the one that decides over none."""
EXIT_CODES = {"INVALID": 2, "REGRESSED": 1}
STRICT_EXIT_CODES = EXIT_CODES | {"NO_GOLDEN": 2, "INCONCLUSIVE": 3}


@dataclass(frozen=True)
class Verdict:
    """Outcome for one metric.

    Attributes:
        status: REGRESSED, IMPROVED, PASSED or INCONCLUSIVE.
        effect: difference of the mean logs, positive where the new sessions are worse; about a fraction.
        low: the loss is above this with confidence WORSE.
        high: it is below this with confidence RULED_OUT, or WORSE where a single new session was judged.
        smallest_visible: the tolerance that was applied: the smallest effect that would have been called
            REGRESSED. The margin, or what the noise asks for where that is more.
        noise: standard deviation, as estimated, of the mean of one session (of one pair's difference).
    """
    status: str
    effect: float
    low: float
    high: float
    smallest_visible: float
    noise: float


class Side(NamedTuple):
    """What the rule needs of one side's logs. Leading axes, if any, are trials of a simulation."""
    means: np.ndarray
    """Of each session, shape (..., S)."""
    squares: np.ndarray
    """Sum of the squared distances from the session's mean, over all sessions, shape (...)."""
    sizes: np.ndarray
    """Samples of each session, shape (S,)."""


def judge(golden_sessions: list[list[float]], new_sessions: list[list[float]], *, direction: str,
          delta: float = 0.05, margin: float = 0.03) -> Verdict:
    """Compare a metric's samples with its golden's, session by session.

    In logs: d = mean of the golden's S_g session means - mean of the S_n new ones (sign turned for "lower").
    A session's mean varies by what differs from session to session and by what is left of its samples' noise:
    expected before any session is seen

        v_j = max(PRIOR_SD, PRIOR_SHARE s)^2 + s^2 / n_j,    s^2: variance pooled within all sessions, of n_j samples,

    and, once f = S_g + S_n - 2 degrees of freedom of session means have been, r times that, with

        r = (PRIOR_DF + sum over sessions of (m_j - mean of its side)^2 / v) / (PRIOR_DF + f),

    v being the v_j expected of that sum's terms on average: the posterior scale under a scaled inverse chi-squared
    prior on a normal variance (Gelman et al., Bayesian Data Analysis, 3rd ed., 2.6; the moderated t of Smyth,
    Stat. Appl. Genet. Mol. Biol. 3(1), 2004). So d has Student's t with PRIOR_DF + f degrees of freedom around
    the true loss, with se^2 = r (mean_g(v_j) / S_g + mean_n(v_j) / S_n), and

        REGRESSED     d > max(margin, t(WORSE) se): beyond the margin, and beyond what noise explains;
        IMPROVED      high = d + t(RULED_OUT) se < -margin;
        PASSED        high < delta: a loss of delta is ruled out;
        INCONCLUSIVE  otherwise,

    the first that holds. With one new session, `high` takes WORSE for RULED_OUT.

    Args:
        golden_sessions, new_sessions: a list of samples for each engine session; positive numbers.
        direction: "higher" or "lower", whichever is better.
        delta: the loss that must be ruled out for PASSED, as a fraction of the speed: a time that is
            1 / (1 - delta) times as long is such a loss too.
        margin: the loss below which a difference is not called one, likewise.

    Raises:
        ValueError: no samples, or one that is not a positive number; unknown direction.
    """
    sign = _sign(direction)
    golden, new = _side(_logs(golden_sessions, "golden")), _side(_logs(new_sessions, "new"))
    difference, error, df, noise = estimate(golden, new)
    status, low, high, visible = decide(sign * difference, error, df, new.sizes.size, delta, margin)
    return Verdict(str(status), *(float(x) for x in (sign * difference, low, high, visible, noise)))


def estimate(golden: Side, new: Side) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """Golden minus new, its standard error and degrees of freedom, and the standard deviation of a session's mean."""
    sides = (golden, new)
    df_within = sum(int((s.sizes - 1).sum()) for s in sides)
    within = (golden.squares + new.squares) / max(df_within, 1)
    between = np.maximum(PRIOR_SD**2, PRIOR_SHARE**2 * within)
    expected = [between + within * np.mean(1 / s.sizes) for s in sides]
    df_seen = sum(s.sizes.size - 1 for s in sides)
    weight = sum((s.sizes.size - 1) * v for s, v in zip(sides, expected)) / max(df_seen, 1)
    seen = sum(((s.means - s.means.mean(-1, keepdims=True)) ** 2).sum(-1) for s in sides)
    df = PRIOR_DF + df_seen
    ratio = (PRIOR_DF + (seen / weight if df_seen else 0.0)) / df
    error = np.sqrt(ratio * sum(v / s.sizes.size for s, v in zip(sides, expected)))
    return golden.means.mean(-1) - new.means.mean(-1), error, df, np.sqrt(ratio * expected[0])


def decide(effect, error, df: int, new_sessions: int, delta: float, margin: float) -> tuple:
    """Status, low, high and the tolerance applied, for an effect with its standard error (numbers or arrays)."""
    above, below = WORSE, WORSE if new_sessions == 1 else RULED_OUT
    return _classify(effect, error * stats.t.ppf(above, df), error * stats.t.ppf(below, df), delta, margin)


def judge_pairs(a: list[list[float]], b: list[list[float]], *, direction: str,
                delta: float = 0.03, margin: float = 0.02) -> Verdict:
    """Compare two variants that took turns on one machine, A B B A and again: is b worse than a?

    In logs, a pair's difference is the mean of its a samples - the mean of its b samples (sign turned for
    "lower"), d the mean over pairs, and low and high are d -+ t(PAIRED) se: the paired t test, one-sided
    (Student, Biometrika 6(1), 1908). In this order: REGRESSED if d > margin and p < 1 - PAIRED, which is low > 0;
    IMPROVED if high < -margin; PASSED if high < delta; else INCONCLUSIVE. Whatever drifts evenly over the
    experiment cancels in d if the number of pairs is even and every other pair starts with b.

    Args:
        a, b: for each pair its samples of the one and of the other; positive numbers.

    Raises:
        ValueError: as `judge`; fewer than two pairs, or not as many of a as of b.
    """
    sign = _sign(direction)
    logs = [_logs(side, name) for side, name in ((a, "a"), (b, "b"))]
    if len(logs[0]) != len(logs[1]) or len(logs[0]) < 2:
        raise ValueError(f"{len(logs[0])} of a and {len(logs[1])} of b; expected two pairs or more")
    differences = sign * np.subtract(*(_side(x).means for x in logs))
    status, effect, low, high, visible = decide_pairs(differences, delta, margin)
    return Verdict(str(status), *(float(x) for x in (effect, low, high, visible, differences.std(ddof=1))))


def decide_pairs(differences: np.ndarray, delta: float, margin: float) -> tuple:
    """Status, effect, low, high and the tolerance applied, for pairs along the last axis."""
    effect = differences.mean(-1)
    reach = stats.sem(differences, axis=-1) * stats.t.ppf(PAIRED, differences.shape[-1] - 1)
    status, *bounds = _classify(effect, reach, reach, delta, margin)
    return status, effect, *bounds


def _classify(effect, reach_low, reach_high, delta: float, margin: float) -> tuple:
    """The statuses in their order. delta and margin are fractions of the speed, the rest logs."""
    delta, margin = -math.log1p(-delta), -math.log1p(-margin)
    tolerance, high = np.maximum(margin, reach_low), effect + reach_high
    status = np.select([effect > tolerance, high < -margin, high < delta], ["REGRESSED", "IMPROVED", "PASSED"], "INCONCLUSIVE")
    return status, effect - reach_low, high, tolerance


def _sign(direction: str) -> int:
    if direction not in ("higher", "lower"):
        raise ValueError(f"direction is {direction!r}; expected 'higher' or 'lower'")
    return 1 if direction == "higher" else -1


def _logs(sessions: list[list[float]], which: str) -> list[np.ndarray]:
    arrays = [np.asarray(s, dtype=float) for s in sessions]
    if not arrays or any(a.size == 0 for a in arrays):
        raise ValueError(f"the {which} side has no samples, or a session without any")
    if any(not np.all(np.isfinite(a) & (a > 0)) for a in arrays):
        raise ValueError(f"the {which} side has a sample that is not a positive number: {sessions}")
    return [np.log(a) for a in arrays]


def _side(sessions: list[np.ndarray]) -> Side:
    return Side(np.array([s.mean() for s in sessions]), np.array(sum(((s - s.mean()) ** 2).sum() for s in sessions)),
                np.array([s.size for s in sessions]))


def overall(statuses: list[str]) -> str:
    """The status of a run, or of several, from those of its parts; PASSED for none."""
    return min(statuses, key=ORDER.index, default="PASSED")


def exit_code(statuses: list[str], strict: bool = False) -> int:
    """0 nothing regressed, 1 regressed, 2 invalid; strict: also 2 without a golden, 3 inconclusive.
    2 wins over 1, over 3, over 0."""
    codes = STRICT_EXIT_CODES if strict else EXIT_CODES
    found = {codes.get(s, 0) for s in statuses}
    return next((c for c in (2, 1, 3) if c in found), 0)


def change(effect: float, direction: str) -> float:
    """Change of the metric itself, as a fraction of the golden, for an effect in logs."""
    return math.expm1(-effect if direction == "higher" else effect)
