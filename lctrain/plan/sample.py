"""A few layers that stand for all: layers that keep the same are alike, so that one more of them costs what one did."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from lctrain.memory.savings import Savings

NUM_UNITS = (
    3  # of alike layers: the first and the last, which have other neighbours, and one like all that are left out
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Neighbouring layers with the same savings, in a sample. A unit is what repeats: the layers from kept input to
    kept input.
    """

    first: int
    unit: int
    num_left_out: int  # units, behind the second

    def each(self, sizes: Sequence[int]) -> int:
        """What one of them amounts to: the third less the second, as the model's input lives beside the first."""
        return sizes[self.first + 3 * self.unit - 1] - sizes[self.first + 2 * self.unit - 1]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The model's first `num_layers` layers, under `savings` that give each section its own."""

    num_layers: int
    savings: Savings
    sections: Sequence[Section]

    @property
    def num_left_out(self) -> int:
        """Layers."""
        return sum(section.num_left_out * section.unit for section in self.sections)

    def left_out_below(self, layer: int, sizes: Sequence[int]) -> int:
        """What the left out layers in front of `layer` amount to, where `sizes` are running sums over the sample's."""
        total = 0
        for section in self.sections:
            if section.num_left_out and layer >= section.first + section.unit:
                total += section.num_left_out * section.each(sizes)
        return total


def sample(layers: Sequence[nn.Module], kinds: Sequence[Any], savings: Savings) -> Sample:
    """The smallest of a model whose layers are alike, in parameters and in the `kinds` of attention; else all of it."""
    counts = savings.resolve(len(layers))
    if len({(_shape(layer), kind) for layer, kind in zip(layers, kinds, strict=True)}) > 1:
        return Sample(num_layers=len(layers), savings=counts, sections=())
    checkpointed, every = int(counts.checkpoint_layers), counts.checkpoint_every
    hosted = min(checkpointed, int(counts.offload) * every)
    kept = checkpointed - int(counts.save_attention)  # the first layer that keeps its attention
    sections: list[Section] = []
    moved = {0: 0}  # where a boundary lies in the sample
    for begin, end in pairwise(sorted({0, hosted, kept, checkpointed, len(layers)})):
        unit = every if end <= checkpointed else 1
        left_out = max(0, (end - begin) // unit - NUM_UNITS)
        sections.append(Section(first=moved[begin], unit=unit, num_left_out=left_out))
        moved[end] = moved[begin] + end - begin - left_out * unit
    fewer = replace(
        counts,
        checkpoint_layers=moved[checkpointed],
        save_attention=moved[checkpointed] - moved[kept],
        offload=-(-moved[hosted] // every),
    )
    return Sample(num_layers=moved[len(layers)], savings=fewer, sections=tuple(sections))


def _shape(layer: nn.Module) -> Any:
    parameters = ((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), tuple(parameters)
