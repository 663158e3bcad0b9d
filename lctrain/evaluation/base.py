"""What an evaluation is: a task that reads a model at several context lengths and gives numbers for JSON."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lctrain.errors import InputError

Tokens = NDArray[np.integer[Any]]
Result = dict[str, Any]
Advance = Callable[[str, float], None]
"""Called with what is being done and how many units of work it just finished."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One measurement at several context lengths, in tokens.

    `lengths` ascend; None stands for an eighth, a quarter, a half and the whole of `sequence_length`.
    """

    generates: ClassVar[bool] = False  # decodes token by token, which not every pattern can

    lengths: Sequence[int] | None
    sequence_length: int

    def __post_init__(self) -> None:
        lengths = self.context_lengths
        if not lengths or lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
            raise InputError(f"evaluation lengths must be positive and ascending, not {list(lengths)}: set `lengths`")

    @property
    def context_lengths(self) -> tuple[int, ...]:
        """The lengths that are measured."""
        if self.lengths is None:
            return tuple(self.sequence_length // share for share in (8, 4, 2, 1))
        return tuple(self.lengths)

    def rows(self, length: int) -> int:
        """Rows per batch, so that every length costs about the memory of one row of the longest."""
        return max(1, self.context_lengths[-1] // length)

    def num_units(self) -> float:
        """The whole task's work in units of `advance`: tokens read."""
        return sum(self.num_units_at(length) for length in self.context_lengths)

    @abstractmethod
    def num_units_at(self, length: int) -> float:
        """The work at one length: tokens read."""

    @abstractmethod
    def check(self, documents: Sequence[Tokens]) -> None:
        """Raise InputError where the held-out documents cannot feed the task: cheap, so call it before training."""

    @abstractmethod
    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        documents: Sequence[Tokens],
        advance: Advance,
    ) -> Result:
        """Measure. `by_length` of the result holds the headline number of each length; other keys are detail."""
