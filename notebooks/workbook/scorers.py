"""Scorers: is an answer right? A registry of functions (answer, gold) -> bool."""
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?|[-+]?\$?\.\d+")
SUBTRACTION = re.compile(r"(?<=[\d)])\s*-\s*(?=[$\d(])")


def numeric(answer: str, gold: str) -> bool:
    """Whether the last number an answer states equals the gold one, as numbers.

    Thousands separators, a currency sign and trailing zeros do not matter. `gold` is a bare number or a
    text that ends in one (GSM8K's `#### 42`).
    """
    stated, right = last_number(answer), last_number(gold)
    return stated is not None and stated == right


def last_number(text: str) -> Decimal | None:
    """The last number in a text, or None. A minus between two operands (`7-3`) is not a sign."""
    for found in reversed(NUMBER.findall(SUBTRACTION.sub(" - ", text))):
        try:
            return Decimal(found.replace(",", "").replace("$", ""))
        except InvalidOperation:
            continue
    return None


SCORERS: dict[str, Callable[[str, str], bool]] = {"numeric": numeric}
