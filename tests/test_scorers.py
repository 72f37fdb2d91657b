"""Scorers: ours, and parity with verl's and lm-eval's, case by case as their code behaves."""
from typing import get_args

import pandas as pd
import pytest

from workbook import params, scorers
from workbook.scorers import SCORERS

LONG = "so. " * 100
"""400 characters: more than the 300 that verl looks at."""


@pytest.mark.parametrize("answer, gold, right", [
    ("The answer is 7.", "7", True), ("7", "#### 7", True), ("So 3 + 4 = 7", "7", True), ("3 + 4 = 7, not 8", "7", True), ("$1,234.00", "1234", True), ("-4", "-4", True),
    ("0 - 4 = -4", "-4", True), ("5-3", "-3", False), ("0 - 4 = 4", "-4", False), ("", "4", False), ("none", "4", False), (".5", "0.5", True), ("10 eggs", "10", True),
    ("1,000,000", "1000000", True), ("50%", "It is 50 % of 10.\n#### 50", True), ("#### 1,000", "<<10*100=1000>>\n#### 1,000", True), ("3/4", "0.75", True), ("42.5", "42", False),
    ("33.33", "33", False), ("#### 5", "#### -5", False), ("", "", False), ("nothing", "nothing", False),
    ("10,000", "10 000", True), ("10", "10 000", False), ("1234567.5", "x\n#### 1\u00a0234\u202f567.5", True), ("-3", "\u2212 3", True), ("3", "- 3", False), ("5", "2 3", False),
])
def test_numeric(answer, gold, right):
    assert SCORERS["numeric"](answer, gold) is right


@pytest.mark.parametrize("answer, gold, right", [
    ("#### 42", "#### 42", True), ("#### 42", "42", True), ("####42", "42", False), ("#### $42", "42", False), ("#### 42.", "42", False), ("#### 1,234", "1234", True),
    ("#### 42.00", "42", False), ("#### 41 ... #### 42", "42", True), ("#### 42 ... #### 41", "42", False), ("#### -42", "-42", True), ("42", "42", False), ("", "42", False),
    ("#### 42" + LONG, "42", False), (LONG + "#### 42", "42", True), ("#### 1,234", "<<1>>\n#### 1,234", True), ("#### .", "42", False),
])
def test_verl_strict(answer, gold, right):
    assert SCORERS["verl_strict"](answer, gold) is right


@pytest.mark.parametrize("answer, gold, right", [
    ("The answer is 42", "42", True), ("The answer is 42.", "42", False), ("42 eggs .", "42", True), ("1,234", "1234", False), ("$42", "42", True), ("7-3", "-3", True),
    ("42, or 43", "42", False), ("42" + LONG, "42", False), ("none", "42", False), ("...", "42", False), (". , .", "42", False), ("#### 42\n\n,", "42", False),
])
def test_verl_flexible(answer, gold, right):
    """A comma alone is a number there, as is `42.` with its full stop; only `.` is passed over."""
    assert SCORERS["verl_flexible"](answer, gold) is right


@pytest.mark.parametrize("answer, gold, right", [
    ("#### 42", "so\n#### 42", True), ("#### 41 ... #### 42", "#### 42", False), ("#### 42 ... #### 41", "#### 42", True), ("#### 42.", "#### 42", True), ("#### 1,234", "#### 1234", True),
    ("#### 1234", "#### 1,234", True), ("#### $42", "#### 42", False), ("####42", "#### 42", False), ("42", "#### 42", False), ("#### 42.0", "#### 42", False), ("", "#### 42", False),
    ("#### 42" + LONG, "#### 42", True), ("[invalid]", "[invalid]", True),
])
def test_lm_eval_strict(answer, gold, right):
    assert SCORERS["lm_eval_strict"](answer, gold) is right


@pytest.mark.parametrize("answer, gold, right", [
    ("The answer is 42.", "#### 42", True), ("$42", "#### 42", True), ("1,234 eggs", "#### 1234", True), ("-5", "#### -5", True), ("7", "#### 7", True), ("42 in 3 days", "#### 42", False),
    ("42 eggs...", "#### 42", False), ("42.00", "#### 42", False), ("none", "#### 42", False), ("42 " + "x" * 500, "#### 42", True), ("1" * 300, "1" * 300, True),
])
def test_lm_eval_flexible(answer, gold, right):
    """Dots alone are a number there, so that `42...` ends in one; a digit needs no company."""
    assert SCORERS["lm_eval_flexible"](answer, gold) is right


def test_params_know_every_scorer():
    (item,) = get_args(params.Exam.model_fields["scorers"].annotation)
    assert list(get_args(item)) == list(SCORERS)


def test_the_first_scorer_counts_and_the_matrix_shows_where_they_disagree():
    answered = pd.DataFrame({"gold": ["#### 42"] * 4, "answer": ["#### 42", "#### $42.00", "The answer is 42.", "7"]})
    names = ["numeric", "verl_strict", "lm_eval_flexible"]
    scores = scorers.judge(answered, names)
    assert scores.correct.tolist() == scores.numeric.tolist() == [True, True, True, False] and scores.verl_strict.tolist() == [True, False, False, False]
    table = scorers.matrix(scores, names).set_index("scorer")
    assert table.right.tolist() == [75, 25, 50] and table.loc["numeric", "not verl_strict"] == 50 and table.loc["verl_strict", "not numeric"] == 0
    disputed = scorers.disputed(scores, names)
    assert disputed["end of the answer"].tolist() == ["#### $42.00", "The answer is 42."] and disputed["right by"].tolist() == ["numeric", "numeric, lm_eval_flexible"]


def test_a_majority_is_the_most_frequent_stated_answer():
    said = {0: ["5", "7", "7", "it is 7"], 1: ["5", "7", "none", ""], 2: ["none"] * 4, 3: ["8", "7", "8", "7"]}
    answered = pd.DataFrame([{"prompt_id": q, "gold": "7", "answer": a} for q, given in said.items() for a in given])
    scores = scorers.judge(answered, ["numeric"])
    assert scores.stated.tolist()[:8] == ["5", "7", "7", "7", "5", "7", "", ""]
    assert scorers.majority(scores) == 1 / 4, "right in the first; in the last one 8 came first"
