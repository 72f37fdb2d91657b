"""The canary: do the weights know English at all? Asked of fixed sentences, so that no golden is needed.

A run that is meant to have real weights and was loaded with random ones, or with tensors in the wrong place, arrives in
full and at full speed. A model that learnt anything finds plain English far more likely than one that picks its tokens by lot.
"""
import math
from collections.abc import Sequence

import numpy as np

from workbook.tokens import Tokenizer

SENTENCES = (
    "The sun rises in the east and sets in the west, and every morning the birds begin to sing before it is light.",
    "She opened the door, looked around the room, and saw that there was nobody there.",
    "Water boils at a hundred degrees, but high up in the mountains it boils a little earlier.",
    "In the year after the war many people left the country and went to live in the city.",
    "If you want to learn how to play the piano, you have to practice for an hour every day.",
    "The answer to the first question is yes, and the answer to the second question is no.",
)
MARGIN = 2.0
"""Nats a token by which the sentences must be likelier than by lot. SmolLM2-135M is 7.8 better than uniform (-2.96 to -10.80) and
the same model with random weights 0.2 worse (-11.0): 2 is far from both (tests/bench/degenerate_rates.py)."""


def sequences(tokenizer: Tokenizer, window: int = 0) -> list[tuple[list[int], list[int]]]:
    """The sentences as (first token, the others), for the `logprobs` of an engine with a window of so many tokens (0: large enough)."""
    return [(ids[:1], ids[1:(window or len(ids) + 1) - 1]) for ids in tokenizer.encode(list(SENTENCES))]


def mean(logprobs: Sequence[Sequence[float | None]]) -> float:
    """Mean log-probability of a token, nats; NaN if one is not finite."""
    return float(np.mean([math.nan if value is None else value for values in logprobs for value in values]))


def problems(logprobs: Sequence[Sequence[float | None]], vocabulary: int) -> list[str]:
    """A sentence if the model finds the sentences hardly likelier than one does that gives each of `vocabulary` tokens the same chance.

    Args:
        logprobs: as an engine gives them for `sequences`, None where not finite; empty where the weights are not here to be asked.
    """
    if not logprobs:
        return []
    found, uniform = mean(logprobs), -math.log(vocabulary)
    if found >= uniform + MARGIN:
        return []
    return [f"the weights look random: plain English has a mean log-probability of {found:.2f} a token, and {uniform:.2f} if every token were as likely; "
            f"expected {uniform + MARGIN:.2f} or more"]
