"""Accuracy, its interval, and the change on the same questions; drift."""
import numpy as np
import pytest
from scipy import stats
from workbook import accuracy, drift


def test_wilson_interval_of_a_textbook_case():
    """8 of 10: Wilson's interval is 49.0 to 94.3 % (Newcombe 1998 gives the formula)."""
    correct = np.array([[True]] * 8 + [[False]] * 2)
    found = accuracy.estimate(correct)
    z = stats.norm.ppf(0.975)
    centre = (0.8 + z**2 / 20) / (1 + z**2 / 10)
    half = z * np.sqrt(0.8 * 0.2 / 10 + z**2 / 400) / (1 + z**2 / 10)
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half))
    assert (found.value, found.answers, found.questions) == (0.8, 10, 10)


def test_pass_at_n_counts_questions():
    assert accuracy.estimate(np.array([[True, False], [False, False]])).pass_at_n == 0.5


def test_mcnemar_is_exact_and_one_sided():
    """9 lost, 1 gained: P(X >= 9), X binomial(10, 1/2), is 11/1024."""
    golden = np.array([[True]] * 9 + [[False]] * 1 + [[True]] * 5 + [[False]] * 5)
    new = np.array([[False]] * 9 + [[True]] * 1 + [[True]] * 5 + [[False]] * 5)
    found = accuracy.compare(golden, new)
    assert found.p == pytest.approx(11 / 1024)
    assert (found.status, found.drop) == ("REGRESSED", pytest.approx(0.4))


@pytest.mark.parametrize("loss, status", [(0.0, "PASSED"), (0.15, "REGRESSED"), (-0.15, "PASSED")])
def test_samples_are_compared_by_question(loss, status):
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.1, 0.9, size=(200, 1))
    golden = rng.random((200, 4)) < hard
    new = rng.random((200, 4)) < np.clip(hard - loss, 0, 1)
    assert accuracy.compare(golden, new).status == status


def test_no_gate_where_a_fall_cannot_show():
    golden = np.array([[True]] + [[False]] * 49)
    found = accuracy.compare(golden, np.zeros((50, 1), dtype=bool))
    assert found.status == "PASSED" and "not gated" in found.sentence


def test_drift_is_the_mean_difference_of_each_sequence():
    found = drift.compare([[-1.0, -2.0], [-3.0]], [[-1.02, -2.0], [-3.0]])
    assert (found.status, found.mean) == ("PASSED", pytest.approx(0.005))
    assert drift.compare([[-1.0]], [[-1.2]]).status == "REGRESSED"
    assert drift.compare([[-1.0]], [[float("nan")]]).status == "REGRESSED"
    with pytest.raises(ValueError, match="not of the same sequences"):
        drift.compare([[-1.0]], [[-1.0, -2.0]])
