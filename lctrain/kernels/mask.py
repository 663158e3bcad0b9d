"""A mask as kernels get it: a function of indices, evaluated pair by pair or bounded block by block.

Shape legend: B batch, H query heads, L queries, S keys, R rows of a table: B, or 1 where all rows are alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.kernels.interval import Blocks, Interval

IndexMask = Callable[[Any, Any, Any, Any], Any]
"""(batch, query head, query index, key index) -> may attend; of tensors that broadcast, or of intervals. Indices count
the tokens of a row.
"""

PositionMask = Callable[[Any, Any, Any, Any], Any]
"""(batch, query head, query position, key position) -> may attend; likewise. Positions begin anew in every document."""


@dataclass(frozen=True, kw_only=True)
class Local:
    """Causal attention to the last `window` tokens, itself included, inside the group (position + shift) // group.

    None is without bound. With a window and no group, a document's positions below `num_sinks` stay visible.
    Kernels may know this by themselves, without a mask.
    """

    window: int | None = None
    num_sinks: int = 0
    group: int | None = None
    shift: int = 0

    def is_causal(self, length: int) -> bool:
        """Whether nothing but causality bounds it in rows of `length`."""
        return self.group is None and (self.window is None or self.window >= length)


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Who attends to whom in one forward: what `allowed` and `visible` both say, inside a document."""

    q_length: int
    kv_length: int
    num_heads: int  # 1 where all heads are alike
    num_key_value_groups: int  # query heads that share a key-value head
    head_dim: int
    device: torch.device
    dtype: torch.dtype
    allowed: IndexMask  # what the architecture allows (causality, its own window), by index in the row
    visible: PositionMask  # the method's pattern, by position in the document
    q_offset: int = 0  # index in the row of the first query
    kv_offset: int = 0
    positions: tuple[Tensor, Tensor] | None = None  # of queries [R, L] and keys [R, S]; None: the index in the row
    documents: tuple[Tensor, Tensor] | None = None  # their numbers, likewise; None: a row is one document
    num_rows: int = 1
    # All of it, of each of the heads, where they are nothing but local. Queries are the last tokens.
    local: tuple[Local, ...] | None = None

    @property
    def batch(self) -> int:
        tables = self.positions or self.documents
        return 1 if tables is None else tables[0].shape[0]

    @property
    def causal(self) -> bool:
        """Whether it is plain causal attention over rows of one document, whose last tokens are the queries."""
        local = self.local
        return local is not None and all(one.is_causal(self.kv_length) for one in local) and self.documents is None

    @property
    def square(self) -> bool:
        """Whether every token of the row is a query."""
        return self.q_length == self.kv_length

    def mask_mod(self) -> IndexMask:
        """The function of indices in this forward."""
        q_offset, kv_offset, allowed, visible = self.q_offset, self.kv_offset, self.allowed, self.visible
        positions, documents = (tables and [*map(_reader, tables)] for tables in (self.positions, self.documents))

        def attends(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            q, kv = q_idx + q_offset, kv_idx + kv_offset
            mask = allowed(b, h, q, kv)
            if positions is not None:
                q, kv = positions[0](b, q_idx), positions[1](b, kv_idx)
            mask = mask & visible(b, h, q, kv)
            if documents is not None:
                mask = mask & (documents[0](b, q_idx) == documents[1](b, kv_idx))
            return mask

        return attends

    def evaluate(self, q: slice, kv: slice) -> Tensor:
        """The boolean mask [B, H, L, S] of one rectangle."""
        b, h = (torch.arange(n, device=self.device) for n in (self.batch, self.num_heads))
        q_idx, kv_idx = (torch.arange(s.start, s.stop, device=self.device) for s in (q, kv))
        mask: Tensor = self.mask_mod()(b[:, None, None, None], h[:, None, None], q_idx[:, None], kv_idx)
        return mask.expand(self.batch, self.num_heads, q_idx.numel(), kv_idx.numel())

    def bound(self, q: Blocks, kv: Blocks) -> tuple[Tensor, Tensor]:
        """Whether queries of a block surely attend to all keys of a block, and possibly to any: [B, H, L, S] of blocks.

        A block that its index range does not fill is never surely visible. Raises TypeError, AttributeError or
        IndexError where the mask is made of more than arithmetic.
        """
        mask = self._interval(q, kv)
        shape = (self.batch, self.num_heads, len(q.numbers), len(kv.numbers))
        surely = torch.as_tensor(mask.lo) & q.whole() & kv.whole()
        return surely.expand(shape), torch.as_tensor(mask.hi).expand(shape)

    def bound_parts(self, q: Blocks, kv: Blocks) -> Tensor:
        """`possibly` once more, where documents meet: positions of one block are far apart there, so that `bound` tells
        little. Here each document at either end of a block is taken by itself.
        """
        assert self.documents is not None
        mask = self._interval(q.parts(self.documents[0]), kv.parts(self.documents[1]))
        return torch.as_tensor(mask.hi).any(0).any(0)

    def _interval(self, q: Blocks, kv: Blocks) -> Interval:
        b, h = (torch.arange(n, dtype=torch.int32, device=self.device) for n in (self.batch, self.num_heads))
        return Interval.of(self.mask_mod()(b[:, None, None, None], h[:, None, None], q, kv))

    def padded(self, multiple: int) -> "Mask":
        """The same with tables that may be read past their end, up to a multiple of so many entries."""

        def pad(tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            return tables and (*(F.pad(table, (0, -table.shape[1] % multiple)) for table in tables),)  # type: ignore[return-value]

        return replace(self, positions=pad(self.positions), documents=pad(self.documents))


def _reader(table_RS: Tensor) -> Callable[[Any, Any], Any]:
    row_S = table_RS[0] if table_RS.shape[0] == 1 else None

    def read(b: Any, idx: Any) -> Any:
        if isinstance(idx, Blocks):
            return idx.look_up(table_RS)
        return table_RS[b, idx] if row_S is None else row_S[idx]

    return read
