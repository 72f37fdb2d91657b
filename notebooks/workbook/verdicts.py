"""The verdict's rule: is a metric worse than its golden, and how sure is that?"""
import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

PRIOR_SD, PRIOR_DF = 0.01, 4
"""What is believed of the spread between sessions before any is seen: 1 %, worth 4 observations."""
CONFIDENCE = 0.95

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
        low, high: one-sided 95 % bounds of `effect`.
        smallest_visible: the smallest effect this comparison would have called REGRESSED.
    """
    status: str
    effect: float
    low: float
    high: float
    smallest_visible: float


def judge(golden_sessions: list[list[float]], new_sessions: list[list[float]], *, direction: str,
          delta: float = 0.05, margin: float = 0.03) -> Verdict:
    """Compare a metric's samples with its golden's, session by session.

    In logs: d = mean of the golden's session means - mean of the new ones (sign turned for "lower").
    se^2 = s2w (1/ng + 1/nn) + tau2 (1/Sg + 1/Sn), with s2w the variance pooled within sessions, ng and nn
    the samples, Sg and Sn the sessions, and tau2 the variance between session means beyond what s2w
    explains, shrunk to PRIOR_SD^2 with PRIOR_DF degrees of freedom (a scaled inverse chi-squared prior:
    Gelman et al., Bayesian Data Analysis, 3rd ed., 2.6). The interval is Student's t with Satterthwaite's
    degrees of freedom (Biometrics Bulletin 2, 1946). Then, in this order: REGRESSED if low > 0 and
    effect > margin; IMPROVED if high < -margin; PASSED if high < delta; else INCONCLUSIVE.

    Args:
        golden_sessions, new_sessions: a list of samples for each engine session; positive numbers.
        direction: "higher" or "lower", whichever is better.
        delta: the loss that must be ruled out for PASSED, as a fraction.
        margin: the loss below which a difference is not called one, as a fraction.

    Raises:
        ValueError: no samples, or one that is not a positive number; unknown direction.
    """
    if direction not in ("higher", "lower"):
        raise ValueError(f"direction is {direction!r}; expected 'higher' or 'lower'")
    golden, new = _logs(golden_sessions, "golden"), _logs(new_sessions, "new")
    sign = 1 if direction == "higher" else -1
    effect = sign * (_mean_of_means(golden) - _mean_of_means(new))
    error, df = _standard_error(golden, new)
    reach = stats.t.ppf(CONFIDENCE, df) * error
    low, high = effect - reach, effect + reach
    if low > 0 and effect > margin:
        status = "REGRESSED"
    elif high < -margin:
        status = "IMPROVED"
    elif high < delta:
        status = "PASSED"
    else:
        status = "INCONCLUSIVE"
    return Verdict(status, effect, low, high, max(margin, reach))


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


def _logs(sessions: list[list[float]], which: str) -> list[np.ndarray]:
    arrays = [np.asarray(s, dtype=float) for s in sessions]
    if not arrays or any(a.size == 0 for a in arrays):
        raise ValueError(f"the {which} side has no samples, or a session without any")
    if any(not np.all(np.isfinite(a) & (a > 0)) for a in arrays):
        raise ValueError(f"the {which} side has a sample that is not a positive number: {sessions}")
    return [np.log(a) for a in arrays]


def _mean_of_means(sessions: list[np.ndarray]) -> float:
    return float(np.mean([s.mean() for s in sessions]))


def _standard_error(golden: list[np.ndarray], new: list[np.ndarray]) -> tuple[float, float]:
    """Standard error of the effect and its degrees of freedom."""
    everything = golden + new
    df_within = sum(s.size - 1 for s in everything)
    within = sum(((s - s.mean()) ** 2).sum() for s in everything) / df_within if df_within else 0.0
    df_between = len(golden) + len(new) - 2
    excess = 0.0
    if df_between:
        means = [np.array([s.mean() for s in side]) for side in (golden, new)]
        spread = sum(((m - m.mean()) ** 2).sum() for m in means) / df_between
        excess = max(0.0, spread - within * np.mean([1 / s.size for s in everything]))
    df_tau = PRIOR_DF + df_between
    tau2 = (PRIOR_DF * PRIOR_SD**2 + df_between * excess) / df_tau
    part_within = within * sum(1 / sum(s.size for s in side) for side in (golden, new))
    part_between = tau2 * (1 / len(golden) + 1 / len(new))
    variance = part_within + part_between
    df = variance**2 / ((part_within**2 / df_within if df_within else 0.0) + part_between**2 / df_tau)
    return math.sqrt(variance), df
