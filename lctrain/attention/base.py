"""What attends to what. A masked method is one function over positions; every kernel runs that same function.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lctrain.errors import InputError
from lctrain.kernels.mask import Local, PositionMask


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a pattern may depend on besides indices. Heads are global: `first_head` is the first query head here."""

    length: int  # keys in the row
    num_attention_heads: int
    num_key_value_heads: int
    layer_idx: int
    first_head: int = 0
    decoding: bool = False  # fewer queries than keys: the row's final length is not known
    device: torch.device | None = None  # where tensors that a pattern holds must be; None is the default


Run = Callable[["MaskedAttention", Tensor, Tensor, Tensor], Tensor]
"""(pattern, q_BHLD, k_BKSD, v_BKSD) -> [B, H, L, D]: attention under one pattern, on whatever kernel was chosen."""

Bounds = tuple[float, float]


class Attention(ABC):
    """What a model computes in place of full attention: one pattern, or something made from several."""

    supports_sequence_parallel: ClassVar[bool] = True  # the layout tells which heads are here

    @abstractmethod
    def attend(
        self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, layout: Layout, run: Run
    ) -> Tensor:
        """The output [B, H, L, D] of one layer, whose attention module is `module`."""

    @abstractmethod
    def parts(self, layout: Layout) -> Sequence[tuple["MaskedAttention", int]]:
        """The patterns that `attend` runs in this layer, each with its number of query heads: what the layer costs."""

    def equip(self, module: nn.Module, config: PreTrainedConfig) -> None:  # noqa: B027 - most learn nothing
        """Register on a layer's attention module the parameters that the method brings, in fp32; `learned` names them.

        Comes before tuning, which decides whether they train, and on whatever device is current.
        """

    def learned(self) -> Mapping[str, Bounds | None]:
        """What `equip` registers, by name, and within which bounds it is kept after every optimizer step."""
        return {}

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:  # noqa: B027 - most fit always
        """Raise InputError if the method does not fit the model, or rows of these lengths (ascending)."""

    def can_decode(self) -> bool:
        """Whether the method is defined while the row's final length is not known."""
        return True

    def adapt_config(self, config: PreTrainedConfig) -> str | None:
        """Write into the config what plain transformers can reproduce; returns what was replaced, for the log."""
        return None


class MaskedAttention(Attention):
    """A static pattern.

    `visible` sees positions *inside a document*, so a packed document attends exactly as it would alone. Causality,
    documents, padding and the model's own window are and-ed to every pattern where it is installed, never here.

    Patterns of one class and equal fields mean the same mask, which a forward prepares once for each `layer_group` and
    group of heads. So a pattern is a frozen dataclass, and `visible` depends on its fields and the layout alone. A
    pattern that is more than the values of its fields (`lctrain.attention.identity`), such as one that holds a tensor
    made from q and k, is prepared anew on each call and never remembered.

    Written with + - * // % comparisons & | ~ it is also evaluated on intervals of positions, and which blocks it leaves
    empty or fills costs nothing to find (`lctrain.kernels.interval`); anything else works, and builds more slowly.
    """

    @abstractmethod
    def visible(self, layout: Layout) -> PositionMask:
        """The pattern of one layer as a function of positions."""

    def local(self, layout: Layout, head: int) -> Local | None:
        """All that a query head sees, where that is its group, or recent tokens and sinks. Kernels know these."""
        return None

    def local_heads(self, layout: Layout, heads: Iterable[int]) -> tuple[Local, ...] | None:
        """`local` of each of these heads, None where one of them sees anything else."""
        found = [self.local(layout, head) for head in heads]
        known = tuple(local for local in found if local is not None)
        return known if len(known) == len(found) else None

    def layer_group(self, layer_idx: int) -> Hashable:
        """Layers of one group share one mask."""
        return None

    def head_group(self, layout: Layout, head: int) -> Hashable:
        """Query heads of one group see the same; `head` counts those of the whole layer."""
        return None

    def head_groups(self, layout: Layout, num_heads: int) -> tuple[Hashable, ...]:
        """Of `num_heads` query heads from `layout.first_head` on; one where they are all alike."""
        groups = tuple(self.head_group(layout, layout.first_head + head) for head in range(num_heads))
        return groups if len(set(groups)) > 1 else groups[:1]

    def attend(
        self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, layout: Layout, run: Run
    ) -> Tensor:
        return run(self, q_BHLD, k_BKSD, v_BKSD)

    def parts(self, layout: Layout) -> Sequence[tuple["MaskedAttention", int]]:
        return [(self, layout.num_attention_heads)]


def require_positive(method: object, **values: int | float | None) -> None:
    """InputError unless every given value is positive."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise InputError(f"{type(method).__name__}: {name} must be positive, got {value}")
