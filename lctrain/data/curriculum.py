"""Curricula: how the length of training rows grows. Tokens per optimizer step stay constant: shorter rows, more rows.

Distinct lengths are few, so that little recompiles.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import ceil

from lctrain.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Curriculum(ABC):
    """A row length for each optimizer step, never above the target `sequence_length`."""

    sequence_length: int

    @abstractmethod
    def length_at(self, step: int, tokens_per_step: int) -> int:
        """Return the number of tokens in a row at optimizer step `step` (from 0)."""

    @abstractmethod
    def lengths(self) -> list[int]:
        """Return every length that can occur, ascending."""


@dataclass(frozen=True, kw_only=True)
class Fixed(Curriculum):
    """A curriculum with the target length from the first step on."""

    def length_at(self, step: int, tokens_per_step: int) -> int:
        return self.sequence_length

    def lengths(self) -> list[int]:
        return [self.sequence_length]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a curriculum with one row length: `sequence_length` tokens or a `fraction` of the target.

    It lasts a number of `steps`, a number of `tokens` or a `share` of the run's steps, or else to the end of the run.
    """

    sequence_length: int | None = None
    fraction: float | None = None
    steps: int | None = None
    tokens: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if (self.sequence_length is None) == (self.fraction is None):
            raise InputError(f"{self}: give either sequence_length or fraction")
        durations = [d for d in (self.steps, self.tokens, self.share) if d is not None]
        if len(durations) > 1 or any(d <= 0 for d in durations):
            raise InputError(f"{self}: give one positive steps, tokens or share, or none for a stage without end")

    def length(self, target: int) -> int:
        """Return the number of tokens in a row, for a curriculum with this target length."""
        return self.sequence_length if self.sequence_length is not None else round((self.fraction or 0) * target)

    def num_steps(self, num_steps: int, tokens_per_step: int) -> float:
        """Return how many steps the stage lasts in a run of `num_steps`; tokens are rounded up to whole steps."""
        if self.tokens is not None:
            return ceil(self.tokens / tokens_per_step)
        if self.share is not None:
            return round(self.share * num_steps)
        return float("inf") if self.steps is None else self.steps


@dataclass(frozen=True, kw_only=True)
class Staged(Curriculum):
    """A curriculum of consecutive stages, as in LongLoRA's and ProLong's recipes. The last one lasts to the run's end.

    `num_steps` is the number of the run's optimizer steps, which the `share` of a stage refers to.
    """

    num_steps: int
    stages: Sequence[Mapping[str, float | None]]

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError("curriculum.stages is empty; give at least one stage")
        if any(s.steps is s.tokens is s.share is None for s in self._stages[:-1]):
            raise InputError("only the last stage of curriculum.stages may be without steps, tokens or share")
        if self.num_steps <= 0 and any(s.share is not None for s in self._stages):
            raise InputError(
                "a stage's share needs the number of steps; set trainer.max_steps, or give steps or tokens"
            )
        if outside := [n for n in self.lengths() if not 1 < n <= self.sequence_length]:
            raise InputError(f"curriculum lengths {outside} are not within 2..sequence_length={self.sequence_length}")

    @cached_property
    def _stages(self) -> list[Stage]:
        known = {field.name for field in fields(Stage)}
        for stage in self.stages:
            if unknown := set(stage) - known:
                raise InputError(f"a curriculum stage has no {', '.join(sorted(unknown))}; it has {sorted(known)}")
        return [Stage(**stage) for stage in self.stages]  # type: ignore[arg-type]

    def length_at(self, step: int, tokens_per_step: int) -> int:
        for stage in self._stages[:-1]:
            step -= int(stage.num_steps(self.num_steps, tokens_per_step))
            if step < 0:
                return stage.length(self.sequence_length)
        return self._stages[-1].length(self.sequence_length)

    def lengths(self) -> list[int]:
        return sorted({stage.length(self.sequence_length) for stage in self._stages})


@dataclass(frozen=True, kw_only=True)
class Linear(Curriculum):
    """A curriculum of `num_lengths` equally long stages with evenly spaced lengths, from `start_fraction` of the target
    to the target.

    The stages together last `num_steps`, and the last one has the target length and goes on to the end of the run.
    Every length but the target is rounded up to `multiple_of`.
    """

    start_fraction: float
    num_lengths: int
    num_steps: int
    multiple_of: int

    def __post_init__(self) -> None:
        if not 0 < self.start_fraction <= 1:
            raise InputError(f"curriculum.start_fraction={self.start_fraction} must be in (0, 1]")
        if self.num_lengths < 2 or self.multiple_of < 1:
            raise InputError("curriculum.num_lengths must be at least 2 and curriculum.multiple_of at least 1")
        if self.num_steps < self.num_lengths:
            raise InputError(f"curriculum.num_steps={self.num_steps} must be at least num_lengths={self.num_lengths}")

    def length_at(self, step: int, tokens_per_step: int) -> int:
        return self._length(min(step * self.num_lengths // self.num_steps, self.num_lengths - 1))

    def lengths(self) -> list[int]:
        return sorted({self._length(i) for i in range(self.num_lengths)})

    def _length(self, i: int) -> int:
        grown = self.start_fraction + (1 - self.start_fraction) * i / (self.num_lengths - 1)
        return min(self.sequence_length, ceil(grown * self.sequence_length / self.multiple_of) * self.multiple_of)
