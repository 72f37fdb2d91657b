"""Accuracy, its interval, and the change on the same questions; drift."""
import itertools
import types

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from workbook import accuracy, drift, exams, goldens, paths, scorers, subjects


def test_wilson_interval_at_one_sample_a_question_is_the_textbooks():
    correct = np.array([[True]] * 8 + [[False]] * 2)
    found, textbook = accuracy.estimate(correct), stats.binomtest(8, 10).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((textbook.low, textbook.high))
    assert (found.value, found.answers, found.questions, found.worth) == (0.8, 10, 10, pytest.approx(10))
    for share in (0.0, 1.0):
        found, textbook = accuracy.estimate(np.full((10, 4), bool(share))), stats.binomtest(int(10 * share), 10).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((textbook.low, textbook.high), abs=1e-9), "four samples that agree are worth one"


def test_the_interval_covers_the_accuracy_of_questions_drawn_anew():
    """Hard and easy questions, four samples each: 95 % of the intervals hold the mean over all questions (0.5), where
    those for 4 x 60 independent answers hold it far less often."""
    rng = np.random.default_rng(0)
    held = naive = 0
    for _ in range(1000):
        correct = rng.random((60, 4)) < rng.beta(0.5, 0.5, size=(60, 1))
        found = accuracy.estimate(correct)
        held += found.low <= 0.5 <= found.high
        low, high = accuracy.wilson(found.value, found.answers)
        naive += low <= 0.5 <= high
    assert held >= 935 and naive < 850


def test_samples_that_are_no_more_alike_than_others_count_in_full():
    found = accuracy.estimate(np.array([[True, False]] * 30))
    assert found.worth == 60


def test_pass_at_k_is_the_share_of_draws_that_solve():
    """2 right of 4: one draw of 4 is right in 1/2, two in 5/6 (1 - 1/6), three always."""
    correct = np.array([[True, True, False, False], [False] * 4])
    assert accuracy.estimate(correct).pass_at == pytest.approx([1 / 4, 5 / 12, 1 / 2, 1 / 2])
    assert accuracy.pass_at(np.array([[True], [False]])) == [0.5]


def test_mcnemar_is_exact_and_one_sided():
    """9 lost, 1 gained: P(X >= 9), X binomial(10, 1/2), is 11/1024."""
    golden = np.array([[True]] * 9 + [[False]] * 1 + [[True]] * 5 + [[False]] * 5)
    new = np.array([[False]] * 9 + [[True]] * 1 + [[True]] * 5 + [[False]] * 5)
    found = accuracy.compare(golden, new)
    assert found.p == pytest.approx(11 / 1024)
    assert (found.status, found.drop) == ("REGRESSED", pytest.approx(0.4))


@pytest.mark.parametrize("path", sorted((paths.ROOT / "goldens").glob("*/smoke.json")), ids=lambda path: path.parent.name)
def test_answers_given_to_other_questions_are_found(path):
    """What the model really stated, as the shipped golden has it: right where it was asked, and not a question later."""
    golden = goldens.read(path)
    gold, right, correct = [p.gold for p in subjects.chain_sum(exams.load("smoke"), None)], scorers.SCORERS["numeric"], np.array(golden.correct)
    scored = np.array([[right(said or "", answer) for said in row] for row, answer in zip(golden.stated, gold, strict=True)])
    assert (scored == correct).all() and accuracy.compare(correct, scored).status == "PASSED"
    for later in (1, 7, 20):
        shuffled = np.array([[right(said or "", answer) for said in row] for row, answer in zip(np.roll(golden.stated, later, axis=0), gold, strict=True)])
        found = accuracy.compare(correct, shuffled)
        assert found.status == "REGRESSED" and found.p < 1e-3 and shuffled.mean() < scored.mean() / 2


@pytest.mark.parametrize("loss, status", [(0.0, "PASSED"), (0.15, "REGRESSED"), (-0.15, "PASSED")])
def test_samples_are_compared_by_question(loss, status):
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.1, 0.9, size=(200, 1))
    golden = rng.random((200, 4)) < hard
    new = rng.random((200, 4)) < np.clip(hard - loss, 0, 1)
    assert accuracy.compare(golden, new).status == status


def test_sign_flips_are_counted_exactly():
    """Against all 2^6 sign patterns of the differences, with other numbers of samples on either side."""
    rng = np.random.default_rng(3)
    for samples in ((4, 4), (2, 3), (1, 4)):
        golden, new = (rng.random((6, n)) < 0.5 for n in samples)
        differences = golden.mean(axis=1) - new.mean(axis=1)
        flipped = [np.dot(signs, np.abs(differences)) for signs in itertools.product((-1, 1), repeat=6)]
        assert accuracy.compare(golden, new).p == pytest.approx(np.mean(np.array(flipped) >= differences.sum() - 1e-9))
    same = np.array([[True, False], [False, False]])
    assert accuracy.compare(same, same[:, ::-1]).p == 1.0


def test_what_would_have_been_called_a_fall_is_what_is():
    """And the interval of the change leaves zero out where it was, but for a fall of less than a point."""
    rng, called = np.random.default_rng(1), 0
    for samples in (1, 4, 16):
        held = 0
        for _ in range(200):
            questions, loss = rng.choice([40, 200, 600]), rng.choice([0, 0.1, 0.2])
            chance = rng.beta(0.5, 0.5, size=(questions, 1))
            found = accuracy.compare(*(rng.random((questions, samples)) < c for c in (chance, chance * (1 - loss))))
            fell = found.status == "REGRESSED"
            assert fell == (found.drop >= found.smallest_visible - 1e-9) and (found.low >= -1e-9) == (found.p < (0.05 if samples == 1 else 0.01))
            called, held = called + fell, held + (found.low <= loss * chance.mean() <= found.high)
        assert held >= (180 if samples == 1 else 195) - 5, "of 200, at 90 % and 98 %"
    assert 100 < called < 400


def test_no_interval_leaves_what_is_possible():
    found = accuracy.compare(np.ones((30, 1), dtype=bool), np.arange(30)[:, None] < 5)
    assert (found.status, found.high) == ("REGRESSED", 1.0) and "interval -100.0 to" in found.sentence


@pytest.mark.parametrize("samples, sampled, answers", [(1, False, 5), (1, True, 7), (4, False, 7)])
def test_of_answers_that_did_not_change_so_many_would_have_to(samples, sampled, answers):
    """The first power of 1/2 below .05 is the fifth, below .01 the seventh."""
    same = np.arange(100)[:, None] < np.full(samples, 50)
    found = accuracy.compare(same, same, sampled=sampled)
    assert (found.drop, found.high, found.smallest_visible) == (0.0, pytest.approx(answers / samples / 100), pytest.approx(max(0.01, answers / samples / 100)))
    assert f"a fall of {max(1, answers / samples):.1f} would have been called one" in found.sentence


def test_one_drawn_answer_a_question_is_as_noisy_as_several():
    golden = np.array([[True]] * 9 + [[False]] * 2 + [[True]] * 29)
    new = np.array([[False]] * 9 + [[True]] * 2 + [[True]] * 29)
    assert [accuracy.compare(golden, new, sampled=sampled).status for sampled in (False, True)] == ["REGRESSED", "PASSED"], "p = 0.033"


def rates(runs, samples, drop, flips=0.01, questions=1319, seed=0):
    """Share of simulated runs that are REGRESSED. One sample: flips each way, and as many lost on top as make the drop.
    More: every question has its own chance (mostly near 0 or 1), and all samples are drawn anew."""
    rng, found = np.random.default_rng(seed), 0
    for _ in range(runs):
        if samples == 1:
            golden = rng.random(questions) < 0.5
            draw = rng.random(questions)
            new = np.where(golden, draw >= 2 * (flips + drop), draw < 2 * flips)
            golden, new = golden[:, None], new[:, None]
        else:
            chance = rng.beta(0.5, 0.5, size=(questions, 1))
            golden, new = (rng.random((questions, samples)) < c for c in (chance, chance * (1 - drop / 0.5)))
        found += accuracy.compare(golden, new).status == "REGRESSED"
    return found / runs


@pytest.mark.parametrize("samples, drop", [(1, 0.02), (4, 0.03)])
def test_a_fall_is_found_and_noise_is_none(samples, drop):
    """1,000 runs of 1,319 questions each; the bars are .95 and .015."""
    assert rates(1000, samples, drop) >= 0.95 and rates(1000, samples, 0.0) <= 0.015


@pytest.mark.parametrize("questions, samples, then, now, status", [
    (1319, 1, 0.91, 0.49, "REGRESSED"), (1319, 1, 0.91, 0.91, "PASSED"), (1319, 4, 0.86, 0.0, "REGRESSED"), (1319, 4, 0.02, 0.0, "REGRESSED"),
    (1319, 4, 0.02, 0.018, "PASSED"), (1319, 4, 0.005, 0.0, "few"), (50, 1, 0.02, 0.0, "few"), (50, 1, 0.96, 0.5, "REGRESSED"), (40, 1, 0.5, 0.1, "REGRESSED")])
def test_accuracy_gates_wherever_a_fall_would_show(questions, samples, then, now, status):
    """Near none and near all too, where there are questions enough."""
    def of(share):
        return np.arange(questions * samples).reshape(questions, samples) < share * questions * samples
    drop = accuracy.compare(of(then), of(now))
    assert drop.status == ("PASSED" if status == "few" else status) and ("not gated" in drop.sentence) == (status == "few")
    assert f"points on the same {questions:,} questions" in drop.sentence and drop.drop == pytest.approx(then - now, abs=0.01)


@pytest.mark.parametrize("share", [0.015, 0.1, 0.9, 0.985])
def test_the_same_accuracy_drawn_anew_falls_seldom(share):
    """One run in a hundred, as between 20 % and 80 %."""
    rng = np.random.default_rng(5)
    fell = sum(accuracy.compare(*(rng.random((2, 400, 4)) < share)).status == "REGRESSED" for _ in range(300))
    assert fell <= 8


def test_a_sequence_that_is_kept_has_a_token():
    """A prompt of one token less than the window leaves no room to read an answer: its drift would be the mean of nothing."""
    rows = pd.DataFrame({"sample": [0, 0, 1], "prompt_token_ids": [[1] * 7, [1] * 6, [1]], "token_ids": [[5], [5, 6], [5]]})
    assert drift.sequences(None, rows, longest=8) == [{"prompt_token_ids": [1] * 6, "token_ids": [5]}]
    assert drift.sequences(None, rows.head(1), longest=8) == []


def test_a_golden_of_a_larger_window_is_read_as_far_as_the_run_s_goes():
    """What is under test may be a smaller `max_model_len`; a run that fills it has answers of its whole length."""
    kept = [goldens.Sequence(prompt_token_ids=[1] * 6, token_ids=[5, 6], logprobs=[-1.0, -2.0]), goldens.Sequence(prompt_token_ids=[1], token_ids=[7], logprobs=[-3.0])]
    golden = types.SimpleNamespace(sequences=kept)
    asked = drift.sequences(golden, None, longest=8)
    assert asked == [{"prompt_token_ids": [1] * 6, "token_ids": [5]}, {"prompt_token_ids": [1], "token_ids": [7]}]
    assert drift.same(kept, asked) and drift.same(kept, drift.sequences(golden, None, longest=9))
    assert not drift.same(kept, [asked[1], asked[0]]) and not drift.same(kept, asked[:1])
    assert not drift.same(kept, [kept[0].model_copy(update={"token_ids": [5]}), kept[1]]), "what two goldens keep is the same or not"


def test_drift_is_the_mean_difference_of_each_sequence():
    found = drift.compare([[-1.0, -2.0], [-3.0]], [[-1.02, -2.0], [-3.0]])
    assert (found.status, found.mean) == ("PASSED", pytest.approx(0.005))
    assert drift.compare([[-1.0]], [[-1.2]]).status == "REGRESSED"
    cut = drift.compare([[-1.0, -2.0], [-3.0], [-4.0]], [[-1.02], [-3.0], []])
    assert (cut.status, cut.mean) == ("PASSED", pytest.approx(0.01)), "what the window has no room for is not read"
    assert drift.compare([[-1.0]], [[float("nan")]]).status == "REGRESSED"
    with pytest.raises(ValueError, match="not of the same sequences"):
        drift.compare([[-1.0]], [[-1.0, -2.0]])


@pytest.mark.parametrize("right", range(250, 400, 10))
def test_a_fall_of_a_point_is_one_whatever_its_shares_round_to(right):
    golden, new = (np.zeros((1000, 1), bool) for _ in range(2))
    golden[:right], new[10:right] = True, True
    assert accuracy.compare(golden, new).status == "REGRESSED"
    new[9] = True
    assert accuracy.compare(golden, new).status == "PASSED"


def test_samples_of_one_question_are_not_independent_answers():
    one = accuracy.estimate(np.array([[True, False, True, False]]))
    assert one.worth == 1 and one.high - one.low > 0.8


def test_pass_at_k_of_very_many_samples():
    correct = np.zeros((2, 1100), bool)
    correct[:, :20] = True
    found = accuracy.pass_at(correct)
    assert found[0] == pytest.approx(20 / 1100) and found[-1] == 1 and np.all(np.diff(found) >= 0)
    assert found[499] == pytest.approx(1 - np.prod([(1080 - k) / (1100 - k) for k in range(500)]))
