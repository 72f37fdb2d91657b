"""The verdict's rule, by hand and by simulation."""
import math

import numpy as np
import pytest
from scipy import stats
from workbook import verdicts

GOLDEN = [[100, 101, 99], [100, 100, 102], [99, 100, 101]]


def test_by_hand():
    """Two sessions of two against one of two, every term of the formula written out."""
    golden, new = [[100.0, 102.0], [104.0, 106.0]], [[90.0, 91.0]]
    g = [np.log(s) for s in golden]
    n = [np.log(s) for s in new]
    within = sum(((s - s.mean()) ** 2).sum() for s in g + n) / 3
    means = np.array([s.mean() for s in g])
    spread = ((means - means.mean()) ** 2).sum() / 1
    tau2 = (4 * 0.01**2 + 1 * max(0, spread - within / 2)) / 5
    a, b = within * (1 / 4 + 1 / 2), tau2 * (1 / 2 + 1 / 1)
    df = (a + b) ** 2 / (a**2 / 3 + b**2 / 5)
    reach = stats.t.ppf(0.95, df) * math.sqrt(a + b)
    effect = means.mean() - n[0].mean()
    found = verdicts.judge(golden, new, direction="higher")
    assert found.effect == pytest.approx(effect)
    assert (found.low, found.high) == pytest.approx((effect - reach, effect + reach))
    assert found.smallest_visible == pytest.approx(max(0.03, reach))


@pytest.mark.parametrize("new, status", [([100, 101, 99], "PASSED"), ([90, 91, 89], "REGRESSED"), ([110, 111, 109], "IMPROVED"), ([88, 105, 97], "INCONCLUSIVE")])
def test_statuses(new, status):
    assert verdicts.judge(GOLDEN, [new], direction="higher").status == status


def test_direction_lower_mirrors_higher():
    up = verdicts.judge(GOLDEN, [[90, 91, 89]], direction="higher")
    down = verdicts.judge([[1 / x for x in s] for s in GOLDEN], [[1 / 90, 1 / 91, 1 / 89]], direction="lower")
    assert (up.status, up.effect, up.low) == (down.status, pytest.approx(down.effect), pytest.approx(down.low))


def test_sessions_of_one_sample_have_no_within():
    assert verdicts.judge([[100], [101]], [[100]], direction="higher").status == "PASSED"


def test_identical_samples_leave_the_prior():
    found = verdicts.judge([[100, 100]] * 3, [[100, 100]], direction="higher")
    assert found.effect == 0 and found.high > 0.005


@pytest.mark.parametrize("golden, new, direction, message", [
    ([], [[1]], "higher", "the golden side has no samples"),
    ([[1, 2]], [[]], "higher", "the new side has no samples"),
    ([[1, float("nan")]], [[1]], "higher", "the golden side has a sample that is not a positive number"),
    ([[1, 2]], [[0.0]], "higher", "the new side has a sample that is not a positive number"),
    ([[1]], [[1]], "up", "direction is 'up'; expected 'higher' or 'lower'"),
])
def test_what_cannot_be_judged_is_refused(golden, new, direction, message):
    with pytest.raises(ValueError, match=message):
        verdicts.judge(golden, new, direction=direction)


def test_error_rates_by_simulation():
    """Golden 3 x 5, new 1 x 5, within-session CV 2 %, session SD 1 %: few false alarms, a 10 % loss found."""
    rng = np.random.default_rng(1)

    def sessions(count, loss=0.0):
        means = np.log(100 * (1 - loss)) + 0.01 * rng.standard_normal(count)
        return [list(np.exp(m + 0.02 * rng.standard_normal(5))) for m in means]
    trials = 400
    false = sum(verdicts.judge(sessions(3), sessions(1), direction="higher").status == "REGRESSED" for _ in range(trials))
    found = sum(verdicts.judge(sessions(3), sessions(1, 0.10), direction="higher").status == "REGRESSED" for _ in range(trials))
    assert false / trials <= 0.03
    assert found / trials >= 0.98


@pytest.mark.parametrize("statuses, strict, code", [
    ([], False, 0), (["PASSED", "IMPROVED", "NO_GOLDEN", "INCONCLUSIVE", "SKIPPED"], False, 0), (["PASSED", "REGRESSED"], False, 1),
    (["REGRESSED", "INVALID"], False, 2), (["NO_GOLDEN"], True, 2), (["INCONCLUSIVE"], True, 3), (["INCONCLUSIVE", "REGRESSED"], True, 1),
])
def test_exit_codes(statuses, strict, code):
    assert verdicts.exit_code(statuses, strict) == code


def test_change_is_of_the_metric_itself():
    assert verdicts.change(math.log(1 / 0.9), "higher") == pytest.approx(-0.10)
    assert verdicts.change(math.log(1.1), "lower") == pytest.approx(0.10)
