"""Passkey retrieval (Mohtashami & Jaggi, arXiv:2305.16300): a number hidden in a text, asked for at its end."""

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
    """Every trial hides a key of `num_digits` digits of its own; the reply must open with it and no other digit."""

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
        """A token per digit, a space in front and whatever ends the number."""
        return self.num_digits + 2


def first_number(reply: str) -> str | None:
    """The number a reply opens with."""
    match = re.match(r"\s*(\d+)", reply)
    return match and match[1]
