"""Answers against the golden's: rates, lengths, greedy tokens and flipped questions; and how often noise is called worse."""
import numpy as np
import pandas as pd
import pytest
from test_goldens import SEQUENCES, by_repetition, record
from workbook import accuracy, cards, degeneration, drift, goldens, quality
from workbook.degeneration import Tally


def golden(**changes):
    return goldens.session_of(record(), by_repetition(), None, SEQUENCES).model_copy(update=changes)


def keeping(name, questions, samples):
    """A golden that keeps one rate."""
    return golden(rates={name: (sum(questions), samples * len(questions))}, signs={name: list(questions)})


def now(questions, samples):
    return Tally(sum(questions), samples * len(questions), list(questions))


def test_a_rate_that_rose_is_a_regression():
    found = quality.judge_rates({"loop": now([1] * 12 + [0] * 28, 4)}, keeping("loop", [0] * 40, 12))
    assert (found["status"], found["rates"]["loop"]["p"]) == ("REGRESSED", pytest.approx(2**-12))
    assert found["sentence"] == "12 of 160 answers end in a repetition loop (8 %), 0 % of the golden's (p = 0.00024)"
    assert found["rates"]["loop"]["golden"] == [0, 480] and found["rates"]["loop"]["ceiling"] == 0.5


@pytest.mark.parametrize("questions, before", [([1] * 6 + [0] * 34, [0] * 40), ([0] * 40, [4] * 40), ([2] * 40, [2] * 40), ([4] * 4, [0] * 4), ([1] * 8 + [0] * 392, [0] * 400)],
                         ids=["too few questions", "fell", "the same", "four questions", "half a point"])
def test_a_rate_that_did_not_is_none(questions, before):
    assert quality.judge_rates({"loop": now(questions, 4)}, keeping("loop", before, 4))["status"] == "PASSED"


def test_without_a_golden_s_rates_nothing_is_judged():
    for known in (None, golden()):
        found = quality.judge_rates({"loop": now([4] * 40, 4)}, known)
        assert (found["status"], found["sentence"]) == ("NO_GOLDEN", "") and found["rates"]["loop"]["count"] == 160
    assert quality.judge_rates({}, golden()) is None


def false_alarms(runs, questions, samples, sessions, replicas, rates=(0.02, 0.1, 0.3, 0.5), spread=0.3, seed=0):
    """Share of simulated runs that are REGRESSED where nothing changed: every question has its own chance of each sign (a beta
    distribution, `spread` its a + b), and the golden's sessions are drawn anew or are replicas of one draw."""
    rng, found = np.random.default_rng(seed), 0
    names = list(degeneration.SAID)[:len(rates)]
    for _ in range(runs):
        signs, kept, tallies = {}, {}, {}
        for name, rate in zip(names, rates, strict=True):
            chance = rng.beta(spread * rate, spread * (1 - rate), questions)
            drawn = rng.binomial(samples, chance, (sessions, questions))
            before = sessions * drawn[0] if replicas else drawn.sum(axis=0)
            signs[name], kept[name] = before.tolist(), (int(before.sum()), sessions * samples * questions)
            tallies[name] = now(rng.binomial(samples, chance).tolist(), samples)
        found += quality.judge_rates(tallies, golden(rates=kept, signs=signs))["status"] == "REGRESSED"
    return found / runs


@pytest.mark.parametrize("replicas", [False, True])
@pytest.mark.parametrize("questions, samples, sessions", [(40, 4, 3), (200, 4, 3), (1319, 1, 1)])
def test_noise_is_no_rise(questions, samples, sessions, replicas):
    """Four rates at once; the bar is one run in a hundred, with two standard errors of 400 runs."""
    assert false_alarms(400, questions, samples, sessions, replicas, spread=2.0) <= 0.01 + 2 * np.sqrt(0.01 * 0.99 / 400)


# -- lengths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor, status", [(1.0, "PASSED"), (0.95, "PASSED"), (0.8, "REGRESSED"), (1.25, "REGRESSED")])
def test_lengths_are_held_within_a_tenth(factor, status):
    rng = np.random.default_rng(0)
    means = rng.uniform(10, 40, size=(100, 1))
    before, new = (rng.poisson(means * f, size=(100, 4)) for f in (1.0, factor))
    found = quality.judge_lengths(new, golden(lengths=before.tolist()))
    assert found["status"] == status and found["ratio"] == pytest.approx(factor, abs=0.05)
    if status == "REGRESSED":
        assert f"answers are {found['ratio'] * 100:.0f} % as long as the golden's" in found["sentence"] and "expected 90 % to 110 %" in found["sentence"]


def test_lengths_of_few_questions_vary_and_are_no_regression():
    """Ten questions: the means differ by more than a tenth in many a run, and in one in a hundred at most it counts."""
    rng = np.random.default_rng(1)
    alarms = outside = 0
    for _ in range(500):
        before, new = (rng.geometric(0.05, size=(10, 4)) for _ in range(2))
        found = quality.judge_lengths(new, golden(lengths=before.tolist()))
        alarms, outside = alarms + (found["status"] == "REGRESSED"), outside + (not 0.9 <= found["ratio"] <= 1.1)
    assert outside > 150 and alarms <= 9


def test_lengths_without_spread():
    assert quality.judge_lengths(np.full((4, 2), 3), golden(lengths=[[48, 48]] * 4))["status"] == "REGRESSED"
    assert quality.judge_lengths(np.full((4, 2), 48), golden(lengths=[[48, 48]] * 4))["status"] == "PASSED"
    assert quality.judge_lengths(np.full((1, 2), 3), golden(lengths=[[48, 48]]))["status"] == "PASSED", "one question says nothing"
    assert quality.judge_lengths(np.ones((4, 2)), golden()) is None is quality.judge_lengths(np.ones((4, 2)), None)


# -- greedy answers -------------------------------------------------------------------------------


def greedy(*answers):
    return pd.DataFrame({"prompt_token_ids": [[1, i] for i in range(len(answers))], "token_ids": [np.array(a) for a in answers]})


def test_where_greedy_answers_part():
    sequences = [{"prompt_token_ids": [1, i], "token_ids": [5, 6, 7, 8]} for i in range(3)]
    assert drift.parted(sequences, greedy([5, 6, 7, 8], [5, 6, 7, 8, 9], [5, 6, 7, 8])) == (0, 12), "a golden keeps the beginning"
    assert drift.parted(sequences, greedy([5, 9, 7, 8], [5, 6], [5, 6, 7, 8])) == (2, 8)
    assert drift.parted(sequences, greedy([], [], [])) is None and drift.parted(sequences, greedy([4])[:0]) is None


def test_parting_is_held_against_the_golden_s_own():
    steady = golden(parted=(0, 8000))
    assert quality.judge_parting((0, 4000), steady)["status"] == "PASSED"
    assert quality.judge_parting((3, 3500), steady)["status"] == "PASSED", "a near tie or three, with so little known"
    found = quality.judge_parting((9, 1200), steady)
    assert found["status"] == "REGRESSED" and "one in 133 tokens; in its own sessions one in more than 8,000" in found["sentence"]
    assert quality.judge_parting((9, 1200), golden(parted=(18, 2400)))["status"] == "PASSED", "as its own sessions did"
    assert quality.judge_parting((9, 1200), golden()) is None is quality.judge_parting(None, steady)


def test_parting_by_chance_is_seldom_called_one():
    rng = np.random.default_rng(0)
    p = [drift.parts_more((int(rng.poisson(4)), 8000), (int(rng.poisson(2)), 4000)) for _ in range(2000)]
    assert np.mean(np.array(p) < drift.ALPHA) <= 0.01


# -- flipped questions and the table --------------------------------------------------------------


def test_flipped_questions_with_both_answers():
    right = [[True, True], [False, False], [True, False], [True, True]]
    scores = pd.DataFrame([{"prompt_id": q, "sample": s, "gold": "7", "answer": f"so {said} <b>*x*</b>", "stated": said, "correct": said == "7"}
                           for q, said_by in enumerate((("7", "8"), ("7", ""), ("8", "7"), ("9", "8"))) for s, said in enumerate(said_by)])
    generations = pd.DataFrame({"prompt_id": np.repeat(range(4), 2), "prompt": [f"question {q} " + "<i>" * (q == 3) for q in range(4) for _ in range(2)]})
    known = golden(correct=right, stated=[["7", "7"], ["", "3"], ["7", "8"], ["7", "7"]])
    found = quality.flipped(scores, generations, known)
    assert found.prompt.str.slice(0, 10).tolist() == ["question 3", "question 0", "question 1"], "losses first, the largest before; the third has as many right"
    first = found.iloc[0]
    assert (first["gold"], first["right then"], first["answers then"], first["right now"], first["answers now"]) == ("7", "2 of 2", "7, 7", "0 of 2", "9, 8")
    assert found["answers then"].tolist()[2] == "–, 3" and found["end of one that changed"].tolist()[1].startswith("so 8")
    html = cards.table(found)
    assert "<b>" not in html and "&lt;b&gt;" in html and "<i>" not in html and "mathjax_ignore" in html
    assert len(quality.flipped(scores, generations, known, rows=2)) == 2
    assert quality.flipped(scores, generations, known.model_copy(update={"stated": None}))["answers then"].tolist() == ["", "", ""]
    assert len(quality.flipped(scores, generations, None)) == len(quality.flipped(scores, generations, golden())) == 0


def test_the_table_beside_the_golden():
    rates = quality.judge_rates({"loop": now([1, 0], 4)}, keeping("loop", [0, 0], 12))
    lengths = quality.judge_lengths(np.full((4, 2), 3), golden(lengths=[[4, 4]] * 4))
    right = {"value": 0.5, "low": 0.4, "high": 0.6, "golden": 0.45, "golden_low": 0.35, "golden_high": 0.55, "p": 0.9, "status": "PASSED"}
    found = quality.table(right, rates, lengths)
    assert found.now.tolist() == ["50.0 % (40.0 % to 60.0 %)", "12.5 % (1 of 8)", "3.0"] and found.golden.tolist() == ["45.0 % (35.0 % to 55.0 %)", "0.0 % (0 of 24)", "4.0"]
    assert found.ceiling.tolist() == ["", "50 %", ""] and len(quality.table(None, None, None)) == 0


# -- what a golden keeps --------------------------------------------------------------------------


def session(loops, logprobs=(-0.5, -0.25), parted=(0, 2)):
    scores = pd.DataFrame({"prompt_id": [0, 0, 1, 1], "sample": [0, 1, 0, 1], "correct": [True] * 4, "stated": ["7", "", "8", "9"], "loop": loops})
    requests = pd.DataFrame([{"session": 1, "repetition": r, "point": 0, "prompt_id": q, "sample": s, "output_tokens": 10 * q + s + r, "arrival_s": 0.0,
                              "first_token_s": 0.1, "last_token_s": 0.2} for r in (1, 2) for q in (0, 1) for s in (0, 1)])
    return goldens.session_of(record(), by_repetition(), scores, [SEQUENCES[0] | {"logprobs": list(logprobs)}], requests, parted)


def test_rates_are_pooled_over_sessions_and_answers_are_the_first_s(tmp_path):
    first, second = session([True, True, False, False]), session([True, False, False, False], logprobs=(-0.5, -0.35), parted=(1, 1))
    merged = goldens.merge(first, second)
    assert merged.rates == {"loop": (3, 8)} and merged.signs == {"loop": [3, 0]}
    assert merged.stated == [["7", ""], ["8", "9"]] and merged.lengths == [[1, 2], [11, 12]]
    assert merged.self_drift == [pytest.approx(0.05)] and merged.parted == (1, 3)
    goldens.write(tmp_path / "g.json", merged)
    assert goldens.read(tmp_path / "g.json") == merged and '["7", ""]' in (tmp_path / "g.json").read_text()
    alone = goldens.merge(first, goldens.session_of(record(), by_repetition(), None, []))
    assert alone.rates == {"loop": (2, 4)} and alone.self_drift == [], "a confirming session has no answers of its own"


def test_the_limit_of_drift_follows_the_noise_between_sessions():
    assert drift.tolerance(golden()) == drift.tolerance(golden(self_drift=[0.01])) == 0.05
    assert drift.tolerance(golden(self_drift=[0.01, 0.04])) == pytest.approx(0.12)


def test_counts_of_different_numbers_of_samples_are_compared_as_shares():
    assert accuracy.differences(np.array([6, 0]), 12, np.array([2, 1]), 4).tolist() == [0, -3]


@pytest.mark.parametrize("before", range(0, 100, 5))
def test_a_rise_of_two_points_is_one_whatever_its_shares_round_to(before):
    golden_signs = [1] * before + [0] * (1000 - before)
    for rise, status in ((20, "REGRESSED"), (19, "PASSED")):
        now = [1] * (before + rise) + [0] * (1000 - before - rise)
        assert quality.judge_rates({"loop": Tally(before + rise, 1000, now)}, keeping("loop", golden_signs, 1))["status"] == status
