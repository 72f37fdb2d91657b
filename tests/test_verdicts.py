"""The verdict's rule, by hand and by simulation."""
import math

import numpy as np
import pytest
from bench import verdict_rates
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from workbook import verdicts
from workbook.statuses import exit_code

GOLDEN = [[100, 101, 99], [100, 100, 102], [99, 100, 101]]


@pytest.mark.parametrize("golden, new, confidences", [
    ([[100.0, 102.0], [104.0, 106.0, 105.0]], [[90.0, 91.0]], (0.98, 0.98)),
    ([[100.0, 110.0], [104.0, 106.0, 93.0]], [[90.0, 91.0], [97.0, 88.0]], (0.98, 0.95)),
])
def test_by_hand(golden, new, confidences):
    """Every term of the formula written out: a quiet host with one new session, a noisy one with two."""
    g, n = ([np.log(s) for s in side] for side in (golden, new))
    within = sum(((s - s.mean()) ** 2).sum() for s in g + n) / sum(len(s) - 1 for s in g + n)
    between = max(0.01, 0.5 * math.sqrt(within)) ** 2
    assert (between > 0.01**2) == (len(new) == 2)
    vg = between + within * (1 / 2 + 1 / 3) / 2
    vn = between + within / 2
    fg, fn = 1, len(new) - 1
    seen = sum(((m - m.mean()) ** 2).sum() for m in (np.array([s.mean() for s in side]) for side in (g, n)))
    ratio = (8 + seen / ((fg * vg + fn * vn) / (fg + fn))) / (8 + fg + fn)
    error = math.sqrt(ratio * (vg / 2 + vn / len(new)))
    effect = np.mean([s.mean() for s in g]) - np.mean([s.mean() for s in n])
    above, below = (stats.t.ppf(c, 8 + fg + fn) * error for c in confidences)
    found = verdicts.judge(golden, new, direction="higher")
    assert (found.effect, found.low, found.high) == pytest.approx((effect, effect - above, effect + below))
    assert found.smallest_visible == pytest.approx(max(-math.log(0.97), above))
    assert found.confidence == pytest.approx(sum(confidences) - 1)
    assert found.noise == pytest.approx(math.sqrt(ratio * vn))


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


def test_the_unit_does_not_matter():
    one, other = (verdicts.judge([[x * unit for x in s] for s in GOLDEN], [[96 * unit, 97 * unit]], direction="higher") for unit in (1, 1e-3))
    assert (one.status, one.effect, one.low) == (other.status, pytest.approx(other.effect), pytest.approx(other.low))


@given(st.lists(st.lists(st.floats(50, 150), min_size=1, max_size=6), min_size=2, max_size=5), st.floats(0.5, 1))
def test_slower_is_never_better(sessions, factor):
    """The same new sessions, all slower by one factor: no better status, and the interval has the effect in it."""
    *golden, new = sessions
    before, after = (verdicts.judge(golden, [[x * f for x in new]], direction="higher") for f in (1.0, factor))
    rank = ("REGRESSED", "INCONCLUSIVE", "PASSED", "IMPROVED").index
    assert before.low <= before.effect <= before.high
    assert rank(after.status) <= rank(before.status) or after.effect == pytest.approx(before.effect)


def test_a_margin_is_a_fraction_of_the_speed():
    """Quiet sessions in plenty leave the margin alone: 2.9 % less is not a loss and 3.1 % is; as a time, 1 / 0.97."""
    golden, quiet = [[100.0] * 5] * 20, np.ones((20, 5))
    for factor, status in ((0.971, "PASSED"), (0.969, "REGRESSED")):
        assert verdicts.judge(golden, (100 * factor * quiet).tolist(), direction="higher").status == status
        assert verdicts.judge(golden, (100 / factor * quiet).tolist(), direction="lower").status == status


def test_sessions_that_differ_raise_the_tolerance():
    quiet, wild = ([[m, m * 1.01, m * 0.99] for m in means] for means in ((100, 100, 100), (94, 100, 106)))
    tolerances = [verdicts.judge(golden, [[95, 96, 94]], direction="higher").smallest_visible for golden in (quiet, wild)]
    assert tolerances[1] > 1.5 * tolerances[0]


# The bars of the rule, from golden 3 x 5 and new 1 x 5 with its one extra session; tests/bench/verdict_rates.py has the
# whole table and says which bar no rule could meet.
TRIALS = 40_000


@pytest.mark.parametrize("cv, sd, loss, status, low, high", [
    (0.02, 0.01, 0.0, "REGRESSED", 0.003, 0.01), (0.02, 0.01, 0.0, "INCONCLUSIVE", 0, 0.02),
    (0.02, 0.01, 0.05, "REGRESSED", 0.94, 1), (0.02, 0.01, 0.07, "REGRESSED", 0.995, 1),
    (0.005, 0.01, 0.0, "REGRESSED", 0, 0.01),
    (0.04, 0.02, 0.0, "REGRESSED", 0.01, 0.02), (0.04, 0.02, 0.1, "REGRESSED", 0.9, 1), (0.04, 0.02, 0.0, "PASSED", 0.6, 1),
])
def test_rates(cv, sd, loss, status, low, high):
    sides = verdict_rates.trials_of(verdict_rates.Host(cv, sd), np.random.default_rng(1), TRIALS)
    rate = np.mean(verdict_rates.final(*sides, loss)[0] == status)
    assert low <= rate <= high


def test_rates_of_unlucky_goldens():
    picked, rates = verdict_rates.by_golden(verdict_rates.Host(0.02, 0.01), np.random.default_rng(1), 600, 2000, [5, 5, 5])
    assert np.quantile(picked, 0.95) <= 0.03
    assert rates[np.argsort(picked)[-30:]].mean() <= 0.08


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_rates_of_three_metrics_together(correlation):
    doubtful, everything = verdict_rates.family(np.random.default_rng(1), TRIALS, correlation)
    assert 0.005 < doubtful.mean() <= everything.mean() <= 0.02


@pytest.mark.parametrize("samples, sd, more", [(3, 0.0, False), (5, 0.01, False), (2, 0.0, True)])
def test_rates_of_pairs(samples, sd, more):
    differences = verdict_rates.pairs(np.random.default_rng(1), TRIALS, 8, samples, verdict_rates.Host(0.02, sd))
    assert np.mean(verdict_rates.final_pairs(differences, 0.0, more) == "REGRESSED") <= 0.01
    assert np.mean(verdict_rates.final_pairs(differences, 0.03, more) == "REGRESSED") >= 0.93


def test_judge_is_what_the_rates_are_of():
    rng = np.random.default_rng(2)
    golden, new = (np.exp(0.03 * rng.standard_normal((300, s, 5))) for s in (3, 2))
    sides = [verdicts.Side(x.mean(-1), (x.var(-1) * 5).sum(-1), np.array([5] * x.shape[1])) for x in (np.log(golden), np.log(new))]
    together = verdicts.compare(*sides, 0.05, 0.03)
    for i in range(300):
        one = verdicts.judge(golden[i].tolist(), new[i].tolist(), direction="higher")
        assert one.status == together[0][i]
        assert (one.effect, one.low, one.high, one.smallest_visible, one.noise) == pytest.approx([x[i] for x in (*together[1:5], together[6])])


def test_pairs_are_a_paired_t_test():
    a, b = [[100.0, 101.0], [90.0], [80.0, 81.0]], [[95.0], [88.0, 87.0], [76.0]]
    found = verdicts.judge_pairs(a, b, direction="higher")
    logs = [[np.mean(np.log(x)) for x in side] for side in (a, b)]
    test = stats.ttest_rel(*logs, alternative="greater")
    assert found.effect == pytest.approx(np.mean(np.subtract(*logs)))
    assert (found.low, found.high) == pytest.approx(stats.ttest_rel(*logs).confidence_interval(0.90))
    assert (found.status == "REGRESSED") == (test.pvalue < 0.05 and found.effect > -math.log(0.98))
    assert verdicts.judge_pairs(b, a, direction="lower").effect == pytest.approx(found.effect)


@pytest.mark.parametrize("factor, status", [(1, "PASSED"), (0.96, "REGRESSED"), (1.05, "IMPROVED"), (0.976, "INCONCLUSIVE")])
def test_statuses_of_pairs(factor, status):
    noise = [1.01, 0.99, 1.02, 0.98, 1.0, 1.015, 0.97, 1.02]
    found = verdicts.judge_pairs([[100.0]] * 8, [[100 * factor * x] for x in noise], direction="higher", delta=0.03, margin=0.025)
    assert found.status == status


@pytest.mark.parametrize("a, b", [([[1.0]], [[1.0]]), ([[1.0]] * 3, [[1.0]] * 2), ([], [])])
def test_pairs_that_are_none_are_refused(a, b):
    with pytest.raises(ValueError, match=f"{len(a)} of a and {len(b)} of b; expected two pairs or more"):
        verdicts.judge_pairs(a, b, direction="higher")


@pytest.mark.parametrize("statuses, strict, code", [
    ([], False, 0), (["PASSED", "IMPROVED", "NO_GOLDEN", "INCONCLUSIVE", "SKIPPED"], False, 0), (["PASSED", "REGRESSED"], False, 1),
    (["REGRESSED", "INVALID"], False, 2), (["NO_GOLDEN"], True, 2), (["INCONCLUSIVE"], True, 3), (["INCONCLUSIVE", "REGRESSED"], True, 1),
])
def test_exit_codes(statuses, strict, code):
    assert exit_code(statuses, strict) == code


def test_change_is_of_the_metric_itself():
    assert verdicts.change(math.log(1 / 0.9), "higher") == pytest.approx(-0.10)
    assert verdicts.change(math.log(1.1), "lower") == pytest.approx(0.10)
