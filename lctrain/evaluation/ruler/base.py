"""The base class of RULER's tasks (Hsieh et al., arXiv:2404.06654): prompts as long as the length allows."""

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lctrain.errors import InputError
from lctrain.evaluation.base import SHARE, Quantity, Tokens
from lctrain.evaluation.generation import Example, Examples, Generation
from lctrain.evaluation.prompt import start_ids, text_ids

_MOST_DRAWS = 1000  # of one sample: RULER draws without end until one fits


class Sample(NamedTuple):
    """The text of a prompt, the words that begin its answer, and all that the answer should hold."""

    text: str
    opening: str
    references: Sequence[str]


Draw = Callable[[Random, int], Sample]
"""(random numbers, size of the haystack) → a sample."""


@dataclass(frozen=True, kw_only=True)
class Ruler(Generation):
    """A task of `num_samples` prompts per length, with the largest haystack that a binary search finds to fit.

    Every length draws from its own `random.Random(seed)`, first for the sizes that a binary search tries, then for the
    samples, in the order of NVIDIA's generator (github.com/NVIDIA/RULER), so that prompts are the same to the byte.
    As there, a start token is not counted; the row fits, as a model does not read its answer's last token. A score is
    the share of the references that the reply holds, in any case (`string_match_all`).
    """

    quantity: ClassVar[Quantity] = Quantity("string_match_all", SHARE)

    num_samples: int
    max_new_tokens: int
    chat_template: str | None
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1 or self.max_new_tokens < 1:
            raise InputError(f"{self.name} num_samples and max_new_tokens must be positive")

    @abstractmethod
    def step(self, length: int) -> int:
        """Return the smallest size of a haystack, by which one that does not fit is made smaller."""

    @abstractmethod
    def prepare(self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Tokens]) -> Draw:
        """Return the function that draws a sample. Raises InputError if something to draw from is missing."""

    @property
    def num_examples(self) -> int:
        return self.num_samples

    def check(self, documents: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase) -> None:
        self.samples(tokenizer, self.prepare(tokenizer, documents), self.context_lengths[0], num_samples=1)

    def examples(self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Tokens]) -> Examples:
        draw = self.prepare(tokenizer, documents)
        return self.batches(lambda length: self.samples(tokenizer, draw, length, num_samples=self.num_samples))

    def score(self, reply: str, example: Example) -> float:
        return string_match_all(reply, example.references)

    def samples(
        self, tokenizer: PreTrainedTokenizerBase, draw: Draw, length: int, *, num_samples: int
    ) -> list[Example]:
        """Return the first `num_samples` examples of a length. Raises InputError where the length is too short."""
        rng, start, step = Random(self.seed), start_ids(tokenizer, self.chat_template), self.step(length)
        room = length - self.max_new_tokens

        def drawn(size: int) -> tuple[list[int], Sequence[str]]:
            text, opening, references = draw(rng, size)
            return text_ids(tokenizer, text, opening, self.chat_template), references

        size = largest_size(lambda size: len(drawn(size)[0]), length, room, step)
        fitting = [self.fitting(drawn, size, step, room) for _ in range(num_samples)]
        return [
            Example(prompt=np.array([*start, *ids], np.int64), references=references, num_tokens=self.max_new_tokens)
            for ids, references in fitting
        ]

    def fitting(
        self, drawn: Callable[[int], tuple[list[int], Sequence[str]]], size: int, step: int, room: int
    ) -> tuple[list[int], Sequence[str]]:
        """Return the first draw of at most `room` tokens; a haystack of more is followed by one that is `step` smaller.

        At the smallest size RULER draws on until a prompt fits; here InputError ends that.
        """
        for _ in range(_MOST_DRAWS):
            ids, references = drawn(size)
            if len(ids) <= room:
                return ids, references
            size -= step if size > step else 0
        raise InputError(
            f"{self.name}: the smallest haystack and an answer of {self.max_new_tokens} tokens need a length of about "
            f"{len(ids) + self.max_new_tokens}, got {room + self.max_new_tokens}; raise the evaluation's lengths"
        )


def largest_size(num_tokens: Callable[[int], int], length: int, room: int, step: int) -> int:
    """Return the largest size at which a binary search, drawing a haystack at each, finds at most `room` tokens.

    The sizes lie between `step` and three times what the tokens of the first haystack let expect of `length`; if no
    prompt fits, the size is `step`.
    """
    low, high = step, max(int(length / (num_tokens(step) / step) * 3), 2 * step)
    size = step
    while low <= high:
        middle = (low + high) // 2
        if num_tokens(middle) <= room:
            size, low = middle, middle + 1
        else:
            high = middle - 1
    return size


def string_match_all(reply: str, references: Sequence[str]) -> float:
    """Return the share of the references that the reply holds; case is ignored, control characters are line breaks."""
    text = re.sub(r"[\x00-\x1f]", "\n", reply).lower()
    return sum(reference.lower() in text for reference in references) / len(references)
