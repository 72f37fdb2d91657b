"""Each sign of a worthless answer is found, and none where an answer is merely short, odd or cut; the weights' canary."""
import math

import numpy as np
import pandas as pd
import pytest

from workbook import canary, degeneration, embedded, params, tokens
from workbook.errors import BadInput

EXAM = params.check({"run": "x", "num_prompts": 2, "n": 2, "temperature": 0.7, "max_tokens": 40})
SPECIAL, ENDS = {0: "<|endoftext|>", 2: "<|im_end|>", 9: "<|channel|>"}, {0, 2}


def generations(*answers, reason="stop"):
    """Rows of (text, token ids), two samples a question."""
    return pd.DataFrame([{"prompt_id": i // 2, "sample": i % 2, "answer": text, "token_ids": np.array(ids, dtype=np.int32), "finish_reason": reason}
                         for i, (text, ids) in enumerate(answers)])


def found(text, ids=(), reason="stop", exam=EXAM):
    row = degeneration.signs(exam, generations((text, ids), ("another", [5]), reason=reason), SPECIAL, ENDS).iloc[0]
    return {name for name, value in row.items() if value}


WORDS = list(range(100, 140))


@pytest.mark.parametrize("text, ids, reason, expected", [
    ("The answer is 7.", [*WORDS, 2], "stop", set()),
    (" \n", [100, 2], "stop", {"empty"}),
    ("", [2], "stop", {"empty"}),
    ("and so on", WORDS, "length", {"cut_off"}),
    ("so and so and", WORDS[:10] + [7, 8, 9999] * 6, "stop", {"loop"}),
    ("a loop that was cut in its phrase", WORDS[:10] + [7, 8, 9999] * 6 + [7], "length", {"loop", "cut_off"}),
    ("a loop and then an end", WORDS[:10] + [7, 8, 9999] * 6 + [2], "stop", {"loop"}),
    ("1000000", [3] + [4] * 6, "stop", set()),
    ("twice a long phrase", WORDS * 2, "stop", set()),
    ("a loop that the answer left", [7, 8, 9999] * 6 + WORDS, "stop", set()),
    ("!!!!!!!!", [33] * 24, "length", {"loop", "one_token", "cut_off"}),
    ("!!!!!!!!", [33] * 9 + [34], "stop", {"one_token"}),
    ("caf\ufffd au lait", WORDS, "stop", {"invalid_utf8"}),
    ("a character cut in two \ufffd", WORDS, "length", {"cut_off"}),
    ("on and on", [100, 2, 101, 102], "stop", {"special_tokens"}),
    ("as text <|im_end|>", WORDS, "stop", {"special_tokens"}),
    ("a channel is part of an answer", [9, 100, 9, 101, 2], "stop", set()),
    ("no token ids from this server", [], "stop", set()),
    ("ha and " * 9, [], "stop", {"loop"}),
])
def test_signs(text, ids, reason, expected):
    assert found(text, ids, reason) == expected


def test_a_loop_is_found_however_long_its_phrase_is():
    """Against the definition, tried out for every length."""
    rng = np.random.default_rng(0)

    def slow(ids):
        return any(len(ids) >= (stretch := max(3 * p, 16)) and all(ids[-i] == ids[-i - p] for i in range(1, stretch - p + 1)) for p in range(1, len(ids)))
    outcomes = set()
    for _ in range(2000):
        ids = np.concatenate([rng.integers(0, 3, rng.integers(0, 9)), np.tile(rng.integers(0, 3, rng.integers(1, 12)), rng.integers(1, 7))])
        outcomes.add(degeneration.loops(ids))
        assert degeneration.loops(ids) == slow(ids.tolist()), ids
    assert outcomes == {True, False} and not degeneration.loops(np.array([], dtype=int))


def test_thousands_of_long_answers_take_seconds():
    import time
    rng = np.random.default_rng(0)
    rows = generations(*(("some text", rng.integers(100, 1000, 1024)) for _ in range(1000)))
    began = time.process_time()
    degeneration.signs(EXAM, rows, SPECIAL, ENDS)
    assert time.process_time() - began < 5


def test_samples_that_are_all_the_same_are_a_question_s_sign():
    rows = generations(("7", [7]), ("7", [7]), ("7", [7]), ("8", [8]))
    scores = rows.join(degeneration.signs(EXAM, rows, SPECIAL, ENDS))
    assert scores.identical.tolist() == [True, True, False, False]
    tally = degeneration.tally(EXAM, scores)
    assert tally["identical"] == (1, 2, [1, 0]) and tally["empty"] == (0, 4, [0, 0])
    assert degeneration.sentence("identical", tally["identical"]) == "all samples are the same for 1 of 2 questions (50 %)"


@pytest.mark.parametrize("changes, gone", [
    ({"ignore_eos": True}, set(params.CEILINGS)), ({"weights": "dummy"}, set(params.CEILINGS)),
    ({"n": 1}, {"identical"}), ({"n": 1, "temperature": 0.0}, {"identical"}),
    ({"subject": "sharegpt", "max_tokens": 0, "chat_template": False}, {"cut_off"}), ({}, set())])
def test_what_is_watched(changes, gone):
    exam = EXAM.model_copy(update=changes)
    assert set(degeneration.watched(exam)) == set(params.CEILINGS) - gone
    assert set(degeneration.signs(exam, generations(("7", [7])), SPECIAL, ENDS)) == set(degeneration.watched(exam))


def tally(**counts):
    return {name: degeneration.Tally(count, of, []) for name, (count, of) in counts.items()}


@pytest.mark.parametrize("counts, exam, problems", [
    ({"empty": (16, 160)}, EXAM, []),
    ({"empty": (17, 160)}, EXAM, ["17 of 160 answers are empty (11 %); the ceiling of 'empty' is 10 %"]),
    ({"cut_off": (159, 160)}, EXAM, ["159 of 160 answers are cut off before the model stops (99 %); the ceiling of 'cut_off' is 90 %"]),
    ({"cut_off": (16, 16)}, EXAM.model_copy(update={"ceilings": {"cut_off": 1.0}}), []),
    ({"identical": (40, 40)}, EXAM, ["all samples are the same for 40 of 40 questions (100 %); the ceiling of 'identical' is 90 %"]),
    ({"loop": (2, 3)}, EXAM, []), ({"loop": (2, 2)}, EXAM, ["2 of 2 answers end in a repetition loop (100 %); the ceiling of 'loop' is 50 %"]),
])
def test_a_rate_above_its_ceiling_has_a_sentence(counts, exam, problems):
    assert degeneration.problems(exam, tally(**counts)) == problems


def test_a_rare_sign_is_not_called_absent():
    assert degeneration.sentence("one_token", degeneration.Tally(1, 5276, [])) == "1 of 5,276 answers is one token over and over (under 1 %)"
    assert [degeneration.percent(share) for share in (0, 0.004, 0.005, 0.006, 1)] == ["0 %", "under 1 %", "under 1 %", "1 %", "100 %"]


def test_a_ceiling_of_the_exam_is_checked():
    assert params.check({"run": "x", "ceilings": {"cut_off": 1.0}}).ceilings == {"cut_off": 1.0}
    for wrong, said in (({"cutoff": 0.5}, "key 'ceilings' names the rate 'cutoff'; expected one of empty, cut_off, loop, .*; did you mean 'cut_off'"),
                        ({"loop": 1.5}, "key 'ceilings.loop' is 1.5; expected at most 1")):
        with pytest.raises(BadInput, match=said):
            params.check({"run": "x", "ceilings": wrong})


def test_no_ceiling_is_part_of_the_work():
    assert EXAM.model_copy(update={"ceilings": {"loop": 1.0}}).work_hash() == EXAM.work_hash()


# -- the canary -----------------------------------------------------------------------------------


def test_the_canary_knows_random_weights():
    uniform = -math.log(49152)
    assert canary.problems([[-2.96] * 20], 49152) == [] and canary.problems([], 49152) == []
    (said,) = canary.problems([[uniform - 0.2] * 20], 49152)
    assert said == ("the weights look random: plain English has a mean log-probability of -11.00 a token, and -10.80 if every token were as likely; expected -8.80 or more")
    assert canary.problems([[-3.0, None]], 49152), "what is not finite is no sign of life"


def test_the_canary_s_sentences_fit_the_window():
    tokenizer = tokens.Tokenizer(embedded.prepare())
    whole = canary.sequences(tokenizer)
    assert len(whole) == len(canary.SENTENCES) and all(len(p) == 1 and 10 < len(a) < 40 for p, a in whole)
    assert all(len(p) + len(a) < 16 for p, a in canary.sequences(tokenizer, 16))
    assert tokenizer.ends() < tokenizer.special_ids() and {tokenizer.special()[i] for i in tokenizer.ends()} >= {"<|im_end|>", "<|im_start|>"}
