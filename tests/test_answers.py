"""The final answer that a text states: announced, concluded, and how its number is written."""
import time
from fractions import Fraction

import pytest

from workbook.answers import label, readings, stated

ANNOUNCED = [
    ("#### 42", 42), ("####42", 42), ("#### $42.00", 42), ("#### 42.", 42), ("####  $ 42", 42), ("#### 42$", 42), ("#### €42", 42), ("#### ~42", 42), ("#### = 42", 42),
    ("####\n42", 42), ("#### **42**", 42), ("#### 42 <|im_end|>", 42), ("#### The answer is 42", 42), ("#### x = 42", 42), ("#### 42 eggs in 3 days", 42), ("## 42", 42), ("##42", 42),
    ("#### 5 hours (300 minutes)", 5), ("#### 2 + 3 = 5", 5), ("#### 48/2 = 24", 24), ("#### Total: $5 * 3 = $15", 15), ("#### 42 + 8 = 50", 50),
    ("She earns $18 * 5 = <<18*5=90>>90 dollars.\n#### 90", 90), ("#### 42\n\nQ: Bob has 3 cats.", 42), ("first #### 1, no: #### 2", 2),
    (r"\boxed{42}", 42), (r"$\boxed{\$42}$", 42), (r"\boxed{42\text{ eggs}}", 42), (r"\boxed{\frac{3}{4}}", "3/4"), (r"\boxed{1{,}234}", 1234), (r"\boxed{x=42}", 42),
    (r"\boxed{42\%}", 42), (r"\(\boxed{1\,234}\)", 1234), (r"\boxed{-5}", -5), (r"\boxed{2\frac{1}{2}}", "5/2"), (r"so \(\boxed{\text{Total: } 42}\) it is", 42),
    ("The answer is 1,234.", 1234), ("So the final answer is: **$42**.", 42), ("**Answer:** 42", 42), ("**Answer**: 42 eggs", 42), ("Final Answer: 42 eggs in 3 days", 42),
    (r"so the answer is \(42\).", 42), ("A: 42", 42), ("Answer = 42", 42), ("The answer is:\n\n$$42$$", 42), ('{"answer": "42"}', 42),
    ("<answer>42</answer>", 42), ("the answer, in dollars, is 42", 42), ("The answer would be 42", 42), ("The correct answer is (B) 42", 42), ("**The final answer is $10.**", 10),
    ("The answer to the question is therefore 42 dollars.", 42), ("The answer to 6 + 2 is 8, which is 4 times 2.", 8), ("The answer to this problem of 6 + 2 = 8 is 6.", 6),
    ("So the answer is 42 because 6 * 7 = 42.", 42), ("The answer is 8, since 3 + 5 = 8.", 8), ("Answer: 6 * 7 = 42 eggs", 42), ("Answer: 20 minutes * 3 = 60 minutes", 60),
    ("Answer: 25 + 17 = 42. Check: 42 - 17 = 25.", 42), ("The answer is 12 apples - that is, 3 * 4.", 12), ("She has 10 left.\n\n**Answer: 10 apples**", 10),
    ("Answer: 3/4 * 100 = 75", 75), (r"so \\boxed 42 it is", 42), ("boxed{42}", 42), ("The answer is 5k", 5000), ("the final answer is 18 dollars per day * 7 days = 126", 126),
    ("answer is 16 - 3 - 4 = 9 eggs * $2 = $18", 18), ("Final answer: 18 (rounded to 0 digits)", 18), ("The answer is not 18 but 20", 20), ("the answer is 1800 / 100 = 18", 18),
    ("#### 18\n\nQuestion: Bob has 3 cats.\nAnswer: 3 cats\n#### 3", 18), ("Question: 2+2?\nAnswer: 4", 4), ("#### 18<|im_end|>\n<|im_start|>user\n#### 5", 18),
    ("The result is 24. Then she sells 6. So she has 18 left.", 18), ("The answer is twelve.", 12), ("Thus the answer is 42.\n\nQ: Bob has 3 cats.", 42), ("Answer: The 3 friends have 12 candies.", 12),
]
CONCLUDED = [
    ("so **42**", 42), ("She has 42 eggs", 42), ("She has **42** eggs in 2 baskets.", 42), ("5 - 3 = 2", 2), ("The total is 5+7=12 apples.", 12), ("= 42.", 42),
    ("Therefore, Janet makes $18 every day at the farmers' market.", 18), ("Total = $120 - $20 = $100.", 100), ("She has $42-$10=$32 left", 32),
    ("20 + 140 = 160\nTherefore, it takes 160 minutes to download a 200 GB file.", 160), ("It takes 42 minutes.\n\nLet me know if you have questions!", 42),
    ("1. First, 3+4=7.\n2. Then 7*2=14.\n3. She has left.", 14), ("### Step 3: Total\n5 * 8 = 40 dollars", 40), ("#### Step 3: Total\n5 * 8 = 40 dollars", 40),
    ("#### 1. Calculate eggs\n3*3 = 9", 9), ("#### Answer\nShe has 9 eggs.", 9), ("He is in the 5th grade and he is 11.", 11), ("She moves from 7th by 1 spot: 7-1=6th place", 6),
    ("32 feet is taller, so it took three days to pass.", 32), ("The window is 20 feet high.\nSo it took three days to pass it.", 3),
    ("He can skip 4 classes because 10 - 4 = 6.", 4), ("Since 1.76 is less than 2 inches, he recycles it in 3 days.", 3), ("32/96 * 100% = 33.333...%, which rounds down to 33%", 33),
    ("4 + 2 = 6 and then we subtract 2 from 6, which gives us 4", 4), ("7 + 9 = 16, which is the sum of 7 and 9", 16), ("\\[ 5 \\times 8 = 40 \\]", 40), ("she has two apples left", 2),
]
NUMBERS = [
    ("$1,234.50", "1234.5"), ("$12 000", 12000), ("1,00,000 rupees", 100000), ("12,345,678.90", "12345678.9"), ("-42", -42), ("-$5", -5), ("$-5", -5), ("−5", -5), ("7-3", 3), ("5 - 3", 3),
    ("(1+2)-3", 3), ("costs 5-10 dollars", 10), (".5", "0.5"), ("3/4 cup", "3/4"), ("2 1/2 hours", "5/2"), ("2½ hours", "5/2"), ("½ hour", "1/2"), ("1.5e3", 1500), ("1.2 × 10^3", 1200),
    ("10:00 am", 10), ("2:30", "5/2"), ("18 dollars and 50 cents", "18.5"), ("5 million dollars", 5000000), ("5 million dollars", 5), ("50%", 50), ("50%", "0.5"), ("50 percent", 50),
    ("The answer is 3/4.", "3/4"), ("#### 3/4.", "3/4"), ("The probability is 1/6.", "1/6"), (r"\boxed{-\frac{3}{4}}", "-3/4"), ("x = -½", "-1/2"), (r"5 - \frac{1}{2}", "1/2"),
    ("twenty-one", 21), ("three hundred and five", 305), ("\u00a042\u202fkm", 42),
]


@pytest.mark.parametrize("text, value", ANNOUNCED, ids=[text for text, _ in ANNOUNCED])
def test_an_announced_answer_counts(text, value):
    assert Fraction(value) in stated(text), stated(text)


@pytest.mark.parametrize("text, value", CONCLUDED, ids=[text for text, _ in CONCLUDED])
def test_else_the_last_sentence_with_a_number_counts(text, value):
    assert Fraction(value) in stated(text), stated(text)


@pytest.mark.parametrize("text, value", NUMBERS, ids=[f"{text} as {value}" for text, value in NUMBERS])
def test_numbers_are_read_in_their_usual_forms(text, value):
    assert Fraction(value) in stated(text), stated(text)


@pytest.mark.parametrize("text", ["", "none", "no number here, only $ and .", "#### ", "\\boxed{}", "The answer is", "one of them", "1/0", "####\n\n", "Answer: " + "x" * 500, "#### " + "1" * 5000],
                         ids=range(11))
def test_a_text_without_a_number_states_none(text):
    assert stated(text) == frozenset()


def test_a_reading_has_a_label():
    assert [label(stated(text)) for text in ("$1,234.00", "50%", "1/4", "1/3", "5 million", "-2", "none")] == ["1234", "50", "0.25", "0.333333333333", "5000000", "-2", ""]


def test_a_number_is_not_read_out_of_a_name():
    assert [r.values for r in readings("CO2 and x2 in version1.5 of 3D")] == [frozenset({Fraction(3)})]


@pytest.mark.parametrize("filler", ["a", "1", "1 ", "(", "{", "**", "= ", "answer ", "####", "since 1, ", "1,", "\\frac{", "one hundred ", "- "])
def test_no_text_takes_long(filler):
    """Every pattern is linear, or nearly so: 20,000 characters of the worst take less than 2 s."""
    began = time.process_time()
    stated(filler * (20_000 // len(filler)))
    assert time.process_time() - began < 2
