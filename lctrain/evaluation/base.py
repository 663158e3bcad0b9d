"""The base class of evaluation tasks: a task measures a model at several context lengths and returns JSON numbers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lctrain.errors import InputError
from lctrain.evaluation.reader import Reader

Tokens = NDArray[np.integer[Any]]
Result = dict[str, Any]
Advance = Callable[[str, float], None]
"""A progress callback: takes a description of the current work and the units of work just finished."""
Cell = tuple[int | float, ...]
"""The numbers that tell one measurement of a task from its others; the first is the context length."""
Once = Callable[[Cell, float, Callable[[], Any]], Any]
"""(cell, its units of work, function that measures it) → the measured value, converted by JSON.

A resumed evaluation returns the value measured before it was stopped."""
SHARE = "share"  # the unit of numbers from 0 to 1, which tables show in percent


class Texts(Protocol):
    """A tokenized corpus; `lctrain.data.datamodule` implements it."""

    tokenizer: PreTrainedTokenizerBase

    def heldout_documents(self) -> Sequence[Tokens]:
        """Return the documents that no training on the corpus reads."""

    def documents(self) -> Sequence[Tokens]:
        """Return all documents of the corpus."""


@dataclass(frozen=True)
class Quantity:
    """The name and the unit of a task's main number."""

    metric: str
    unit: str


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One measurement at several context lengths, in tokens.

    `lengths` ascend; None means an eighth, a quarter, a half and the whole of `sequence_length`. One batch holds
    `batch_tokens` tokens, in rows of at most one length; None means as many tokens as the longest length has.
    """

    generates: ClassVar[bool] = False  # True: the task decodes token by token, which not every pattern supports

    lengths: Sequence[int] | None
    sequence_length: int
    batch_tokens: int | None

    def __post_init__(self) -> None:
        lengths = self.context_lengths
        if not lengths or lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
            raise InputError(f"evaluation lengths must be positive and ascending, not {list(lengths)}: set `lengths`")
        if self.batch_tokens is not None and self.batch_tokens < lengths[-1]:
            raise InputError(f"batch_tokens={self.batch_tokens} must hold a row of the longest length, {lengths[-1]}")

    @property
    def context_lengths(self) -> tuple[int, ...]:
        """Return the lengths to measure, in tokens."""
        if self.lengths is None:
            return tuple(self.sequence_length // share for share in (8, 4, 2, 1))
        return tuple(self.lengths)

    @property
    @abstractmethod
    def quantity(self) -> Quantity:
        """Return the name and the unit of the numbers in `by_length`."""

    def documents(self, texts: Texts) -> Sequence[Tokens]:
        """Return the documents that the task reads: those that no training on the corpus reads."""
        return texts.heldout_documents()

    def rows(self, length: int) -> int:
        """Return the number of rows per batch, so that every length takes about the same memory."""
        return max(1, (self.batch_tokens or self.context_lengths[-1]) // length)

    def num_units(self) -> float:
        """Return the work of the whole task in units of `advance`: tokens read."""
        return sum(self.num_units_at(length) for length in self.context_lengths)

    @abstractmethod
    def num_units_at(self, length: int) -> float:
        """Return the work at one length: tokens read."""

    @abstractmethod
    def check(self, documents: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise InputError if the documents do not suffice for the task. Cheap, so call it before training."""

    @abstractmethod
    def run(self, reader: Reader, documents: Sequence[Tokens], once: Once, advance: Advance) -> Result:
        """Measure and return the result: `by_length` holds the main number of each length, other keys are details."""
