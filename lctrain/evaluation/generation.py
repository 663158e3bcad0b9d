"""The base class of tasks whose model writes: cells hold examples, and the replies to examples get scores."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import sqrt
from typing import ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from lctrain.evaluation.base import Advance, Cell, Once, Result, Task, Tokens
from lctrain.evaluation.reader import Reader

Examples = Callable[[Cell], Sequence["Example"]]
"""Cell → its examples, which depend on the task's settings and the cell alone."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt, the references with which a reply is compared, and the most tokens that the reply may have.

    `classes` are the answers that the prompt offers; none if the reply is free.
    """

    prompt: Tokens
    references: Sequence[str]
    num_tokens: int
    classes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Generation(Task):
    """A task that scores replies of greedy decoding from 0 to 1 and reports their mean at each length.

    Examples are read in batches with padding on the left. A cell is what the journal saves at once: by default a batch,
    (length, index of its first example among those of the length). The 95 % interval of a mean is Wilson's: a score
    between 0 and 1 varies at most as much as hits and misses with the same mean.
    """

    generates: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Return the task's name in messages."""
        return type(self).__name__.lower()

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """Return the number of examples at each length."""

    @abstractmethod
    def examples(self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Tokens]) -> Examples:
        """Return the function that makes the examples of a cell."""

    @abstractmethod
    def score(self, reply: str, example: Example) -> float:
        """Return the score of a reply, from 0 to 1."""

    def cells(self, length: int) -> Sequence[Cell]:
        """Return the cells at one length."""
        return [(length, first) for first in range(0, self.num_examples, self.rows(length))]

    def details(self, scores: Mapping[Cell, Sequence[float]]) -> Result:
        """Return further entries of the result, from the scores of every cell."""
        return {}

    def num_units_at(self, length: int) -> float:
        return length * self.num_examples

    def batches(self, at: Callable[[int], Sequence[Example]]) -> Examples:
        """Return the function that `examples` should return where cells are batches; `at` makes all of a length."""
        at_length = lru_cache(maxsize=1)(at)

        def batch(cell: Cell) -> Sequence[Example]:
            length, first = map(int, cell)
            return at_length(length)[first : first + self.rows(length)]

        return batch

    @torch.inference_mode()
    def run(self, reader: Reader, documents: Sequence[Tokens], once: Once, advance: Advance) -> Result:
        examples = self.examples(reader.tokenizer, documents)
        scores: dict[Cell, list[float]] = {}
        by_length: dict[str, list[float]] = {}
        for length in self.context_lengths:
            cells = self.cells(length)
            num_units = self.num_units_at(length) / len(cells)
            for cell in cells:
                scores[cell] = once(cell, num_units, partial(self.measure, reader, examples, cell, num_units, advance))
            by_length[str(length)] = [score for cell in cells for score in scores[cell]]
        return {
            "by_length": {length: sum(all_) / len(all_) for length, all_ in by_length.items()},
            "interval": {length: wilson_interval(sum(all_), len(all_)) for length, all_ in by_length.items()},
            **self.details(scores),
            "num_examples": self.num_examples,
        }

    def measure(
        self, reader: Reader, examples: Examples, cell: Cell, num_units: float, advance: Advance
    ) -> list[float]:
        """Return the score of each example of a cell."""
        length, of_cell, scores = int(cell[0]), examples(cell), list[float]()
        for i in range(0, len(of_cell), self.rows(length)):
            batch = of_cell[i : i + self.rows(length)]
            replies = reader.complete([each.prompt for each in batch], [each.num_tokens for each in batch])
            scores += map(self.score, replies, batch)
            advance(f"{self.name} at {length:,}", num_units * len(batch) / len(of_cell))
        return scores


def wilson_interval(total: float, num_examples: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927), valid for few trials and at 0 and 1, unlike the normal one.

    `total` is the number of hits, or the sum of scores from 0 to 1, for which the interval is not too narrow.
    """
    share, spread = total / num_examples, z * z / num_examples
    centre = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / num_examples + spread / (4 * num_examples)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
