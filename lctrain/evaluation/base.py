"""What an evaluation is: a task that reads a model at several context lengths and gives numbers for JSON."""

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
"""Called with what is being done and how many units of work it just finished."""
Once = Callable[[tuple[int | float, ...], float, Callable[[], Any]], Any]
"""(what tells a cell from the task's others, its units of work, how to measure it) → what was measured, now or before
an evaluation that goes on was stopped, as JSON holds it."""


class Texts(Protocol):
    """A tokenized corpus, as `lctrain.data.datamodule` has it."""

    tokenizer: PreTrainedTokenizerBase

    def heldout_documents(self) -> Sequence[Tokens]:
        """What no training on the corpus has seen."""

    def documents(self) -> Sequence[Tokens]:
        """All of it."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One measurement at several context lengths, in tokens.

    `lengths` ascend; None stands for an eighth, a quarter, a half and the whole of `sequence_length`. `batch_tokens`
    are read at once, in rows of one length; None stands for as many as the longest has.
    """

    generates: ClassVar[bool] = False  # decodes token by token, which not every pattern can

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
        """The lengths that are measured."""
        if self.lengths is None:
            return tuple(self.sequence_length // share for share in (8, 4, 2, 1))
        return tuple(self.lengths)

    @property
    def reads_heldout(self) -> bool:
        """Whether its text is what no training on the corpus has seen."""
        return True

    def rows(self, length: int) -> int:
        """Rows per batch, so that every length costs about the same memory."""
        return max(1, (self.batch_tokens or self.context_lengths[-1]) // length)

    def num_units(self) -> float:
        """The whole task's work in units of `advance`: tokens read."""
        return sum(self.num_units_at(length) for length in self.context_lengths)

    @abstractmethod
    def num_units_at(self, length: int) -> float:
        """The work at one length: tokens read."""

    @abstractmethod
    def check(self, documents: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise InputError where the documents cannot feed the task: cheap, so call it before training."""

    @abstractmethod
    def run(self, reader: Reader, documents: Sequence[Tokens], once: Once, advance: Advance) -> Result:
        """Measure. `by_length` of the result holds the headline number of each length; other keys are detail."""
