"""Passkey retrieval (Mohtashami & Jaggi, arXiv:2305.16300): recall of a number that is hidden in other text."""

import re
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lctrain.data.needle import HiddenFact
from lctrain.data.passkey import PASS_KEY, digits, numbered
from lctrain.errors import InputError
from lctrain.evaluation.retrieval import Retrieval


@dataclass(frozen=True, kw_only=True)
class Passkey(Retrieval):
    """A task in which each trial hides a key of `num_digits` random digits; the reply must open with that number."""

    num_digits: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_digits <= 18:
            raise InputError(f"passkey num_digits {self.num_digits} must lie in 1..18")

    def draw(self, rng: np.random.Generator) -> HiddenFact:
        return numbered(PASS_KEY, digits(rng, self.num_digits))

    def is_recalled(self, reply: str, answer: str) -> bool:
        return first_number(reply) == answer

    def num_answer_tokens(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return a token per digit, one for a space before the number and one for what ends it."""
        return self.num_digits + 2


def first_number(reply: str) -> str | None:
    """Return the number that a reply opens with, or None."""
    match = re.match(r"\s*(\d+)", reply)
    return match and match[1]
