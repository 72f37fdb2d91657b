"""The final answer that a text states, as a number: what `scorers.numeric` compares.

A model says its answer in many forms: `#### 42`, `**42**`, a LaTeX box, `The answer is $1,234.00.`, `A: 42`,
`So she has 42 eggs left.` The last place that announces an answer counts; without one, the last sentence that has a
number. A number may be read in more than one way (50 % is 50 and 0.5), so that a reading is a set of values.
"""
import re
from fractions import Fraction
from typing import NamedTuple

DIGITS = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|(?<=[$€£])\d{1,3}(?: \d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
CURRENCY = r"(?:US\$|USD|Rs\.?|[$€£¥₹₱])"
NUMBER = re.compile(
    rf"(?<![A-Za-z0-9.])(?P<sign>[-−–+])?\s?{CURRENCY}?\s?(?P<inner>[-−])?(?P<value>(?<![\d.]){DIGITS})"
    rf"(?:[eE](?P<e>[+-]?\d{{1,2}})\b|\s+(?P<part>\d+/\d+)(?![\d/])|\s*/\s*{CURRENCY}?(?P<under>\d+(?:,\d{{3}})*)(?![\d/]|\.\d)|:(?P<minutes>[0-5]\d)(?!\d)|\s*[×x*]\s*10\s*\^\s*\{{?(?P<power>-?\d+)\}}?)?"
    r"(?P<percent>\s?(?:%|percent\b|per cent\b))?(?:\s?(?P<unit>thousand|million|billion|trillion|k)\b)?(?P<ordinal>(?:st|nd|rd|th)\b)?", re.IGNORECASE)
"""A number with what belongs to it. No sign of a subtraction: `7-3`, `(2) - 3`."""
LONGEST = 60
"""Characters of a number: a model in a loop writes longer ones, and they are none."""
UNITS = {"k": 10**3, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
CENTS = re.compile(rf"(?:{CURRENCY}\s?)?(\d[\d,]*)\s+dollars?\s+and\s+(\d{{1,2}})\s+cents?", re.IGNORECASE)
VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅛": "1/8",
          "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}

FLUFF = (r"(?:[\s*_`$\\()\[\]{}:=\"'“”‘’~≈>|,]|\b(?:is|are|was|will|would|be|been|equals?|to|of|a\s+total|an?\s+amount|only|just|exactly|approximately|about|around|roughly|"
         r"indeed|also|then|thus|so|therefore|hence|simply|actually|total|at|final|answer|ans|text|mathrm|textbf|mathbf|boxed|[a-z](?=\s*=))\b)*")
"""What may stand between an announcement and its number."""
ANNOUNCED = {
    "#": re.compile(r"(?P<hashes>\#{4,})|(?P<few>^[ \t]*\#{2,3}(?!\#))", re.MULTILINE),
    "box": re.compile(r"(?P<box>(?:boxed|\\fbox)\s*\{)|\\boxed\s*(?=\d)"),
    "<answer>": re.compile(r"<answer>"),
    ":": re.compile(r"^[ \t>*_]*(?:a|ans)[*_]*\s*:", re.MULTILINE),
    "answer ": re.compile(r"\banswer\s+(?:to|of|for)\b[^.\n]{0,100}?\bis\b(?=\W{0,8}\d)"),
    **{word: re.compile(rf"(?<![a-z]){word}s?\b(?:(?!\b(?:is|are|was|equals?|be)\b)[^.\n:=\d]){{0,60}}(?:\b(?:is|are|was|equals?|be)\b|[:=])")
       for word in ("answer", "ans")}}
"""What announces an answer, in lower case, by what a text must have in it for that."""
DIRECT = re.compile(FLUFF, re.IGNORECASE)
LIST_ITEM = re.compile(r"\s*\d{1,2}[.)]\s+[A-Za-z*]")
HEADINGS = {"hashes": re.compile(r"\s*(?:\d{1,2}[.)]\s+[A-Za-z*]|Step\b)", re.IGNORECASE), "few": re.compile(r"[ \t]*(?:\d+[.)]\s+[A-Za-z*]|[A-Za-z]|\n|$)")}
"""What makes of hashes a heading of Markdown."""
NEXT = re.compile(r"\n[ \t]*(?:\*\*|\#+[ \t]*)?(?:question|q|problem|human|user|instruction)[ \t]*\d*[ \t]*[:.]", re.IGNORECASE)
TURN = re.compile(r"<\|(?:im_end|endoftext|eot_id|end_of_text|end)\|>|</s>|<end_of_turn>")
"""Where a model that does not stop goes on to the next question, and past the end of its turn."""
TAIL = 800
"""Characters at the end of a text in which an answer without an announcement is looked for first."""
LATEX = [(re.compile(pattern), text) for pattern, text in (
    # A sign stays with its fraction.
    (r"(?<=[-−])\\[dtc]?frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}", r"\1/\2 "),
    (r"\\[dtc]?frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}", r" \1/\2 "), (r"(?<=\d)(?:\{,\}|\\[,!;:]\s?)(?=\d{3})", ""), (r"\\([$%#&_])", r"\1"),
    (r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|emph|underline|bf|rm)\s*\{([^{}]*)\}", r" \1 "), (r"\\times\b", "×"), (r"\\approx\b", "≈"),
    (r"\\(?:left|right|displaystyle|quad|qquad|,|;|!|:)", " "), (r"\^\{?\\circ\}?", " "))]
LIST_MARK = re.compile(r"^\s*(?:[-*•+]\s+)?(?:\*\*)?(?:(?:step|part|question|problem|day|note)\s+)?\#?\d+\s*[.):](?!\d)(?:\*\*)?|^\s*(?:step|part|question|problem)\s+\d+\b", re.IGNORECASE)
SENTENCE = re.compile(r"\n+|(?<=[.!?])[*_)\"']*\s+(?=[^\s\d]|\d+\s)")
CALCULATION = re.compile(r"\s*[A-Za-z ]{0,20}[-+*/×x÷−·]\s*[\d$(.][^=]*=([^\n]*)")
DIVISION = re.compile(r"\s*[A-Za-z ]{0,20}=([^\n]*)")
"""What follows a number that is not yet the answer: `6` of `6 * 7 = 42`, `48/2` of `48/2 = 24`."""
BOLD = re.compile(r"\*\*([^*\n]+)\*\*|__([^_\n]+)__")
RESULT = re.compile(r"=|≈|\bequals\b|\bis equal to\b|\bround(?:s|ed|ing)?(?:\s+(?:up|down|off))?\s+to\b"
                    r"|\b(?:gives?|giving|leaves?|leaving|results?\s+in|resulting\s+in|yields?|totals?|totall?ing)\b(?=\W+(?:[a-z]+\s+){0,3}\$?\d)", re.IGNORECASE)
REASON = re.compile(r"\W*(?:(?:so|but|and|then|therefore|thus),?\s+)?(?:since|because|if|given|as|when|after|with|for)\b[^\n]*?,\s+(?=\D)", re.IGNORECASE)
ASIDE = re.compile(r"(?<=[\w%])\s+\([^()=+*/]*\)(?!\s*[-+*/])")
CIRCUMSTANCE = re.compile(r"\b(?:in|for|per|every|after|at|on|from|within|than|over|during|of\s+(?:the|these|those|his|her|their)|out\s+of)\s+(?:the\s+|these\s+|those\s+|his\s+|her\s+|their\s+|all\s+|only\s+|just\s+|another\s+|[-$€£(*~]|about\s+)*$", re.IGNORECASE)
BECAUSE = re.compile(r",?\s+(?:because|since)\b", re.IGNORECASE)
CONCLUSION = re.compile(r"\W*(?:so|therefore|thus|hence|in total|this means|that means)\b|[^\n]*\b(?:so|therefore|thus|hence)\b", re.IGNORECASE)

ONES = {w: i for i, w in enumerate("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split())}
TENS = {w: 10 * i for i, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6}
WORDS = re.compile(rf"\b(?:{'|'.join([*ONES, *TENS])})\b(?:[\s-]+(?:and\s+)?(?:{'|'.join([*ONES, *TENS, *SCALES])})\b)*", re.IGNORECASE)


class Reading(NamedTuple):
    """A number in a text: where it stands, and the values it may have."""
    start: int
    values: frozenset[Fraction]
    ordinal: bool


def stated(text: str) -> frozenset[Fraction]:
    """Values of the final answer that a text states; empty if it states none."""
    text = _plain(text)
    if "<" in text and (turn := TURN.search(text)) and text[:turn.start()].strip():
        text = text[:turn.start()]
    lower = text.lower()
    if len(lower) != len(text):  # of a few letters of other alphabets
        lower = text
    announced = sorted((match for needed, pattern in ANNOUNCED.items() if needed in lower for match in pattern.finditer(lower)), key=re.Match.end)
    if (other := NEXT.search(text)) and any(_announced(text, match) for match in announced if match.end() < other.start()):
        return stated(text[:other.start()])
    for match in reversed(announced):
        if values := _announced(text, match):
            return values
    return (_concluded(text[-TAIL:]) if len(text) > TAIL else frozenset()) or _concluded(text)


def label(values: frozenset[Fraction]) -> str:
    """A reading in digits, its largest whole value where it has several; empty where it is none."""
    if not values:
        return ""
    value = max(values, key=lambda v: (v.denominator == 1, v))
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.12g}"


def readings(text: str) -> list[Reading]:
    """All numbers in a text, in order."""
    found = []
    for match in NUMBER.finditer(text):
        if (values := _values(match, text)) is not None:
            found.append(Reading(match.start("value"), values, bool(match["ordinal"])))
    return found


def _plain(text: str) -> str:
    """Without LaTeX around numbers, and with one kind of space."""
    text = text.replace("\u00a0", " ").replace("\u202f", " ").replace("\u2009", " ")
    if "\\" in text or "{,}" in text:
        for pattern, instead in LATEX:
            text = pattern.sub(instead, text)
    for sign, instead in VULGAR.items():
        if sign in text:
            text = re.sub(rf"(?<![-−]){sign}", f" {instead}", text).replace(sign, instead)
    return CENTS.sub(lambda m: f"${m[1]}.{int(m[2]):02}", text) if "cents" in text or "cent " in text else text


def _values(match: re.Match, text: str) -> frozenset[Fraction] | None:
    """Values of one number; None of a division by zero, and of digits without end (Python reads no more than 4,300)."""
    if match.end() - match.start() > LONGEST:
        return None
    value = Fraction(match["value"].replace(",", "").replace(" ", ""))
    if match["part"] or match["under"]:
        above, _, under = match["part"].partition("/") if match["part"] else ("0", "", match["under"].replace(",", ""))
        if not int(under):
            return None
        value = value + Fraction(int(above), int(under)) if match["part"] else value / int(under)
    elif match["minutes"]:
        value += Fraction(int(match["minutes"]), 60)
    elif power := match["power"] or match["e"]:
        value *= Fraction(10) ** max(-30, min(30, int(power)))
    if match["inner"] or (match["sign"] and match["sign"] != "+" and not _subtracts(text, match.start("sign"))):
        value = -value
    other = {value / 100} if match["percent"] else {value * UNITS[match["unit"].lower()]} if match["unit"] else set()
    return frozenset({value} | other)


def _subtracts(text: str, at: int) -> bool:
    """Whether the sign there joins two operands, a range or a bullet and its item, and is none of a number."""
    if text[at + 1:at + 2].isspace():
        return True
    before = text[max(0, at - 12):at].rstrip(" \t")
    return bool(before) and (before[-1].isdigit() or before[-1] in ")%]}")


def _announced(text: str, found: re.Match) -> frozenset[Fraction]:
    """Values of the number that follows an announcement, if it follows at once."""
    kind = found.lastgroup
    if kind == "box":
        inside = _braced(text, found.end())
        return _result(inside) or _spelled(inside)
    begin = found.end()
    if kind in ("hashes", "few") and HEADINGS[kind].match(text, begin):
        return frozenset()
    start = DIRECT.match(text, begin).end()
    # The sign and the currency may have been taken for fluff.
    while start > begin and text[start - 1] in "$-−– ":
        start -= 1
    line = text[start:].lstrip().partition("\n")[0]
    if "\n" in text[begin:start] and LIST_ITEM.match(line):  # `Answer:` and then the steps
        return frozenset()
    if (number := NUMBER.match(line)) and (values := _values(number, line)) is not None:
        return _chained(line, number, values)
    if (words := WORDS.match(line.lstrip(" $*"))) and kind != "few":
        return _spelled(words[0])
    return frozenset()


def _chained(line: str, number: re.Match, values: frozenset[Fraction]) -> frozenset[Fraction]:
    """Values of the number, or, if it begins a calculation (`6 * 7 = 42 eggs`), those of what comes out."""
    rest = SENTENCE.split(line[number.end():])[0]
    if chain := (number["under"] and DIVISION.match(rest)) or CALCULATION.match(rest):
        return _result("=" + chain[1]) or values
    return values


def _result(text: str) -> frozenset[Fraction]:
    """Values of the first number behind the last equals sign, or of the first one."""
    found = readings(text)
    if not found:
        return frozenset()
    last = max((m.end() for m in RESULT.finditer(text)), default=0)
    return next((r.values for r in found if r.start >= last), found[-1].values if last else found[0].values)


def _braced(text: str, begin: int) -> str:
    """What is inside the brace that opened before `begin`."""
    depth = 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[begin:end]
    return text[begin:].partition("\n")[0]


def _concluded(text: str) -> frozenset[Fraction]:
    """Values of the answer in the last sentence that has a number."""
    pieces = SENTENCE.split(text)
    for index in range(len(pieces) - 1, -1, -1):
        piece = _claim(LIST_MARK.sub("", pieces[index]))
        found = readings(piece)
        if not found:
            if CONCLUSION.match(piece) and (values := _spelled(piece)):
                return values
            continue
        return _pick(piece, "\n".join(pieces[:index]))
    return _spelled(text)


def _pick(sentence: str, before: str) -> frozenset[Fraction]:
    """Values of that number of a sentence which is its answer: what is set in bold, what comes out of a calculation, what
    came out of the last one before it, or the last that is no circumstance (`in 3 days`)."""
    for bold in reversed(BOLD.findall(sentence)):
        if readings(bold[0] or bold[1]):
            return _pick(bold[0] or bold[1], before)
    found = readings(sentence)
    last = max((m.end() for m in RESULT.finditer(sentence)), default=0)
    if last and (behind := [r for r in found if r.start >= last]):
        return behind[0].values
    found = [r for r in found if not r.ordinal] or found
    computed = _computed(before) if len(found) > 1 else frozenset()
    for wanted in (lambda r: computed & r.values, lambda r: not CIRCUMSTANCE.search(sentence, 0, r.start)):
        if values := next((r.values for r in reversed(found) if wanted(r)), None):
            return values
    return found[-1].values


def _claim(sentence: str) -> str:
    """A sentence without its reasons and asides: `Since 5 > 3, it is 5`, `It is 5, because 5 > 3`, `It is 5 (and not 3)`."""
    while (reason := REASON.match(sentence)) and readings(sentence[reason.end():]):
        sentence = sentence[reason.end():]
    for shorten in (lambda s: ASIDE.sub(" ", s), lambda s: BECAUSE.split(s)[0]):
        if readings(shorten(sentence)):
            sentence = shorten(sentence)
    return sentence


def _computed(text: str) -> frozenset[Fraction]:
    """Values of the last number that an equals sign stands before."""
    for found in reversed(list(RESULT.finditer(text))):
        start = DIRECT.match(text, found.end()).end()
        if number := next(iter(readings(text[max(found.end(), start - 3):start + 30])), None):
            return number.values
    return frozenset()


def _spelled(text: str) -> frozenset[Fraction]:
    """Value of the last number that is written in words; of `one`, which is mostly a pronoun, none."""
    words = None
    for words in WORDS.finditer(text):
        pass
    if not words or words[0].lower() == "one":
        return frozenset()
    total = part = 0
    for word in re.split(r"[\s-]+", words[0].lower()):
        if word in SCALES:
            part = max(part, 1) * SCALES[word]
            if word != "hundred":
                total, part = total + part, 0
        else:
            part += ONES.get(word, TENS.get(word, 0))
    return frozenset({Fraction(total + part)})
