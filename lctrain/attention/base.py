"""Define the interface of an attention method.

A pattern is one function over positions, which every kernel runs. Any other method runs patterns, or masks that it
makes from q and k, through the `Call` that it is given.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, E extra keys, D head dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lctrain.errors import InputError
from lctrain.kernels.mask import IndexMask, Local, PositionMask


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The facts besides positions on which a pattern may depend.

    Heads are counted over the whole layer: `first_head` is the first query head that is here.
    """

    length: int  # keys in the row
    num_attention_heads: int
    num_key_value_heads: int
    layer_idx: int
    first_head: int = 0
    decoding: bool = False  # fewer queries than keys: the row's final length is not known
    device: torch.device | None = None  # where tensors that a pattern holds must be; None is the default


Bounds = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The tables of positions and documents of the S keys of one forward, [B, S], on the device of the queries.

    The queries are those of `num_queries` tokens in sequence, the first of which is at index `first_query` of the keys.
    Keys after the last query's are unused room in a cache.
    """

    positions_BS: Tensor  # of each token in its document
    documents_BS: Tensor  # the number of its document in the row; padding is a document of its own
    first_query: int  # index among the keys
    num_queries: int
    shared: dict[Any, Any]  # results that one layer of a forward computes and the others use


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Keys and values beside those of the tokens, such as summaries of segments, and which queries see them.

    `visible` is (batch, query head, index of the query among the tokens, index of the extra key) -> may attend, for
    tensors that broadcast. Here a method must itself keep queries from seeing later tokens and other documents.
    """

    k_BKED: Tensor
    v_BKED: Tensor
    visible: IndexMask


class Call(ABC):
    """One run of attention in one layer: the facts that a method gets beside q, k and v, and its ways to attend."""

    layout: Layout
    scaling: float  # of q · k before the softmax

    @property
    @abstractmethod
    def rows(self) -> Rows:
        """Return the tables of positions and documents of the forward."""

    @abstractmethod
    def run(self, pattern: "MaskedAttention", q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
        """Return attention under a static pattern, [B, H, L, D], at that pattern's own cost."""

    @abstractmethod
    def over(
        self, visible: IndexMask, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, extra: Extra | None = None
    ) -> Tensor:
        """Return attention under a mask that depends on this forward, [B, H, L, D], with one softmax over all keys.

        `visible` is (batch, query head, index of the query among the tokens, index of the key) -> may attend, for
        tensors that broadcast. Causality, documents, padding and the model's own window are and-ed to it.
        """


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of attention that is no static pattern."""

    keys: float  # keys that a query attends to, averaged over queries of a full row
    other_flops: float = 0.0  # of a query and head besides attending, such as those of choosing keys
    has_mask: bool = True  # made from q and k, which each layer keeps to its backward


class Attention(ABC):
    """What a model computes in place of full attention: one pattern, or anything made from q, k and v.

    What a method learns is one child module of each layer's attention module, named like the method's file. It is made
    before tuning, which always trains it, and exported and loaded with the model.
    """

    supports_sequence_parallel: ClassVar[bool] = True  # on some of the heads, which the layout names

    @abstractmethod
    def attend(self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, call: Call) -> Tensor:
        """Return the output [B, H, L, D] of one layer, whose attention module is `module`."""

    @abstractmethod
    def parts(self, layout: Layout) -> Sequence[tuple["MaskedAttention | Cost", int]]:
        """Return what `attend` runs in this layer, each with its number of query heads: what the layer costs."""

    @property
    def name(self) -> str:
        """Return the name of the method's file, which is also that of its child module."""
        return type(self).__module__.rpartition(".")[2]

    def child(self, config: PreTrainedConfig, layout: Layout) -> nn.Module | None:
        """Return what the method learns in a layer, with parameters in fp32; None where it learns nothing."""
        return None

    @property
    def learns(self) -> bool:
        """Return whether the method has child modules."""
        return type(self).child is not Attention.child

    def owns(self, parameter_name: str) -> bool:
        """Return whether a parameter of the model belongs to a child module of this method."""
        return self.learns and self.name in parameter_name.split(".")

    def bounds(self) -> Mapping[str, Bounds]:
        """Return the bounds within which parameters of the child are kept after every optimizer step, by name."""
        return {}

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:  # noqa: B027 - most fit always
        """Raise InputError if the method does not fit the model, or rows of these lengths (ascending)."""

    def can_decode(self) -> bool:
        """Return whether the method is defined while the row's final length is not known."""
        return True

    def adapt_config(self, config: PreTrainedConfig) -> str | None:
        """Write into the config what plain transformers can reproduce; return what was replaced, for the log."""
        return None


class MaskedAttention(Attention):
    """A method that is one static pattern: a function of positions, the same for every text.

    `visible` sees positions *inside a document*, so a packed document attends exactly as it would alone. Causality,
    documents, padding and the model's own window are and-ed to every pattern where it is installed, never here.

    Patterns of one class and equal fields mean the same mask, which a forward prepares once for each `layer_group` and
    group of heads. So a pattern is a frozen dataclass, and `visible` depends on its fields and the layout alone. A
    pattern that is more than the values of its fields (`lctrain.attention.identity`), such as one that holds a tensor
    made from q and k, is prepared anew on each call and never remembered.

    A `visible` that is written with + - * // %, comparisons and & | ~ is also evaluated on intervals of positions, so
    that the blocks that it leaves empty or fills are found without a look at pairs (`lctrain.kernels.interval`). Any
    other works too, and its blocks are found pair by pair.
    """

    @abstractmethod
    def visible(self, layout: Layout) -> PositionMask:
        """Return the pattern of one layer as a function of positions."""

    def local(self, layout: Layout, head: int) -> Local | None:
        """Return all that a query head sees, where that is its group, or recent tokens and sinks; else None."""
        return None

    def local_heads(self, layout: Layout, heads: Iterable[int]) -> tuple[Local, ...] | None:
        """Return `local` of each of these heads; None where one of them sees anything else."""
        found = [self.local(layout, head) for head in heads]
        known = tuple(local for local in found if local is not None)
        return known if len(known) == len(found) else None

    def layer_group(self, layer_idx: int) -> Hashable:
        """Return the group of a layer; the layers of one group share one mask."""
        return None

    def head_group(self, layout: Layout, head: int) -> Hashable:
        """Return the group of a query head, counted over the whole layer; the heads of one group see the same."""
        return None

    def head_groups(self, layout: Layout, num_heads: int) -> tuple[Hashable, ...]:
        """Return the groups of `num_heads` query heads from `layout.first_head` on; one where they are all alike."""
        groups = tuple(self.head_group(layout, layout.first_head + head) for head in range(num_heads))
        return groups if len(set(groups)) > 1 else groups[:1]

    def attend(self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, call: Call) -> Tensor:
        return call.run(self, q_BHLD, k_BKSD, v_BKSD)

    def parts(self, layout: Layout) -> Sequence[tuple["MaskedAttention | Cost", int]]:
        return [(self, layout.num_attention_heads)]


def require_positive(method: object, **values: int | float | None) -> None:
    """Raise InputError unless every given value is positive."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise InputError(f"{type(method).__name__}: {name} must be positive, got {value}")
