"""Sample a few layers to represent all: layers with the same savings are alike, so that each more costs the same."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from lctrain.memory.savings import Savings

# Units of alike layers in a sample: the first and the last, which have other neighbours, and one like all left out.
NUM_UNITS = 3


@dataclass(frozen=True, kw_only=True)
class Section:
    """A sample's neighbouring layers with the same savings. They consist of equal units: the layers from one kept input
    to the next.
    """

    first: int
    unit: int
    num_left_out: int  # units that the sample leaves out, after the second

    def each(self, sizes: Sequence[int]) -> int:
        """Return the size of one left-out unit, from running sums over layers: the third sum minus the second.

        The first unit is no measure, because the model's input is also held then.
        """
        return sizes[self.first + 3 * self.unit - 1] - sizes[self.first + 2 * self.unit - 1]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The model's first `num_layers` layers, under `savings` that give each section the savings of its layers."""

    num_layers: int
    savings: Savings
    sections: Sequence[Section]

    @property
    def num_left_out(self) -> int:
        """Return the number of layers that the sample leaves out."""
        return sum(section.num_left_out * section.unit for section in self.sections)

    def left_out_below(self, layer: int, sizes: Sequence[int]) -> int:
        """Return the total size of the left-out layers before `layer`; `sizes` are running sums over sampled layers."""
        total = 0
        for section in self.sections:
            if section.num_left_out and layer >= section.first + section.unit:
                total += section.num_left_out * section.each(sizes)
        return total


def sample(layers: Sequence[nn.Module], kinds: Sequence[Any], savings: Savings) -> Sample:
    """Return the smallest sample of a model whose layers are alike in parameters and `kinds` of attention; else all
    layers.
    """
    counts = savings.resolve(len(layers))
    if len({(_shape(layer), kind) for layer, kind in zip(layers, kinds, strict=True)}) > 1:
        return Sample(num_layers=len(layers), savings=counts, sections=())
    checkpointed, every = int(counts.checkpoint_layers), counts.checkpoint_every
    hosted = min(checkpointed, int(counts.offload) * every)
    kept = checkpointed - int(counts.save_attention)  # the first layer that keeps its attention
    sections: list[Section] = []
    moved = {0: 0}  # from a boundary's index in the model to its index in the sample
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
