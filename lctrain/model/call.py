"""One call of attention in a layer: the forward's mask, as transformers describes it, and what methods do with it.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, E extra keys, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from lctrain.attention.base import Call, Extra, Layout, MaskedAttention, Rows
from lctrain.attention.identity import value
from lctrain.errors import InputError
from lctrain.kernels.base import Kernel
from lctrain.kernels.mask import IndexMask, Mask
from lctrain.memory.recall import attend_once
from lctrain.parallel.ulysses import Ulysses

Sides = tuple[Tensor, Tensor]  # one table for queries [B or 1, L] and one for keys [B or 1, S]


@dataclass(frozen=True)
class ForwardMask:
    """A forward's mask as transformers describes it, and what was prepared from it: one per forward and layer type."""

    batch: int
    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    mask_function: IndexMask  # causality, the model's own window
    padding_BS: Tensor | None  # True where a key is a token
    positions_BS: Tensor | None  # positions of keys among the row's tokens; given with padding
    prepared: dict[Any, Any] = field(default_factory=dict)  # kernels' forms of masks, by pattern; and `tables`
    shared: dict[Any, Any] = field(default_factory=dict)  # results that layers compute for each other

    @property
    def is_plain(self) -> bool:
        """Return whether nothing but causality hides a token from a later one of its document."""
        return self.mask_function is causal_mask_function and self.padding_BS is None

    @property
    def first_query(self) -> int:
        """Return the index of the first query among the keys."""
        return self.q_offset - self.kv_offset

    def tables(self, position_ids_BL: Tensor) -> tuple[Sides | None, Sides | None]:
        """Return the tables of positions in the document and of document numbers, for queries and keys.

        The first is None if positions are the indices in the row, the second if each row is one document. A document
        begins where a position is not the one before plus one.
        """
        if self.padding_BS is not None:
            assert self.positions_BS is not None
            # Padding is a document of its own, so that its queries see padding and no softmax is over nothing.
            return self._sides(self.positions_BS), self._sides(self.padding_BS)
        if self.q_length != self.kv_length:
            return None, None
        row = torch.arange(self.kv_length, device=position_ids_BL.device)
        begins = position_ids_BL.diff(dim=1, prepend=position_ids_BL[:, :1] - 1) != 1
        packed, indices = torch.stack((begins.any(), (position_ids_BL == row).all())).tolist()  # one sync per forward
        positions = None if indices else self._sides(position_ids_BL)
        return positions, self._sides(begins.cumsum(1)) if packed else None

    def _sides(self, table_BS: Tensor) -> Sides:
        table_BS = table_BS.to(torch.int32)
        return table_BS[:, self.first_query : self.first_query + self.q_length], table_BS


@dataclass(frozen=True, kw_only=True)
class LayerCall(Call):
    """A call on a kernel. Masks are those of whole rows, also where ranks share a row by `ulysses`."""

    layout: Layout
    kernel: Kernel
    mask: ForwardMask
    module: nn.Module
    position_ids: Tensor | None
    ulysses: Ulysses | None
    scaling: float
    softcap: float | None

    @cached_property
    def rows(self) -> Rows:
        self._require_positions()
        positions, documents = self._tables()
        device, mask = self.layout.device, self.mask
        indices_S = torch.arange(mask.kv_length, device=device, dtype=torch.int32)
        one_S = torch.zeros_like(indices_S)
        tables = (positions[1] if positions else indices_S), (documents[1] if documents else one_S)
        positions_BS, documents_BS = (table.expand(mask.batch, -1) for table in tables)
        return Rows(
            positions_BS=positions_BS,
            documents_BS=documents_BS,
            first_query=mask.first_query,
            num_queries=mask.q_length,
            shared=mask.shared,
        )

    def run(self, pattern: MaskedAttention, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
        return self._attend(self._prepared(pattern, q_BHLD, k_BKSD), q_BHLD, k_BKSD, v_BKSD)

    def over(
        self, visible: IndexMask, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, extra: Extra | None = None
    ) -> Tensor:
        num_extra = 0
        seen = self._among_tokens(visible)
        if extra is not None:  # before the tokens: kernels may rely on the last key being that of the last query
            num_extra = extra.k_BKED.shape[2]
            seen = _with_extra(seen, extra.visible, num_extra)
            k_BKSD, v_BKSD = torch.cat((extra.k_BKED, k_BKSD), 2), torch.cat((extra.v_BKED, v_BKSD), 2)
        prepared = self.kernel.prepare(self._index_mask(seen, num_extra, q_BHLD, k_BKSD))
        return self._attend(prepared, q_BHLD, k_BKSD, v_BKSD)

    def _attend(self, prepared: Any, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
        attend = partial(self.kernel.attend, prepared=prepared, scaling=self.scaling, softcap=self.softcap)
        return attend_once(attend, q_BHLD, k_BKSD, v_BKSD)

    def _among_tokens(self, visible: IndexMask) -> IndexMask:
        """Return `visible` and all that hides tokens from each other in any method, by index among the keys."""
        allowed, offset = self.mask.mask_function, self.mask.kv_offset
        documents_BS = self.rows.documents_BS

        def seen(b: Any, h: Any, q: Any, kv: Any) -> Any:
            together = documents_BS[b, q] == documents_BS[b, kv]
            return allowed(b, h, q + offset, kv + offset) & together & visible(b, h, q, kv)

        return seen

    def _index_mask(self, seen: IndexMask, num_extra: int, q_BHLD: Tensor, k_BKSD: Tensor) -> Mask:
        """Return a mask whose positions are the indices of queries and keys."""
        first, (batch, num_heads, length, head_dim) = self.mask.first_query, q_BHLD.shape
        indices = (
            torch.arange(first, first + length, device=q_BHLD.device).expand(batch, -1),
            torch.arange(-num_extra, k_BKSD.shape[2] - num_extra, device=q_BHLD.device).expand(batch, -1),
        )
        return Mask(
            q_length=length,
            kv_length=k_BKSD.shape[2],
            num_heads=num_heads,
            num_key_value_groups=num_heads // k_BKSD.shape[1],
            head_dim=head_dim,
            device=q_BHLD.device,
            dtype=q_BHLD.dtype,
            allowed=lambda b, h, q, kv: (q >= 0) & (kv >= 0),
            visible=seen,
            positions=indices,
            num_rows=batch,
        )

    def _prepared(self, pattern: MaskedAttention, q: Tensor, k: Tensor) -> Any:
        """Return what the kernel prepared from a pattern's mask, shared by all layers and heads with the same mask."""
        mask, layout = self.mask, self.layout
        head_groups = pattern.head_groups(layout, q.shape[1])
        told = value(pattern)
        key = (told, pattern.layer_group(layout.layer_idx), head_groups)
        if told is not None and key in mask.prepared:
            return mask.prepared[key]
        last = mask.q_offset + mask.q_length == mask.kv_offset + mask.kv_length  # queries and keys end together
        heads = range(layout.first_head, layout.first_head + len(head_groups))
        local = pattern.local_heads(layout, heads) if mask.is_plain and last else None
        if not (local and all(one.is_causal(mask.kv_length) for one in local)):
            self._require_positions()
        positions, documents = self._tables()
        prepared = self.kernel.prepare(
            Mask(
                q_length=mask.q_length,
                kv_length=mask.kv_length,
                num_heads=len(head_groups),
                num_key_value_groups=q.shape[1] // k.shape[1],
                head_dim=q.shape[-1],
                device=q.device,
                dtype=q.dtype,
                allowed=mask.mask_function,
                visible=pattern.visible(layout),
                q_offset=mask.q_offset,
                kv_offset=mask.kv_offset,
                positions=positions,
                documents=documents,
                num_rows=mask.batch,
                local=local,
            )
        )
        if told is not None:
            mask.prepared[key] = prepared
        return prepared

    def _require_positions(self) -> None:
        if self.position_ids is None:
            name = type(self.module).__name__
            raise InputError(f"{name} hands no position_ids to its attention; it can't be masked")

    def _tables(self) -> tuple[Sides | None, Sides | None]:
        """Return the tables of positions and documents of the whole row, computed once per forward."""
        if self.position_ids is None:
            return None, None
        prepared = self.mask.prepared
        if "tables" not in prepared:
            whole = self.position_ids if self.ulysses is None else self.ulysses.gather(self.position_ids)
            prepared["tables"] = self.mask.tables(whole)
        tables: tuple[Sides | None, Sides | None] = prepared["tables"]
        return tables


def _with_extra(among_tokens: IndexMask, of_extra: Callable[..., Any], num_extra: int) -> IndexMask:
    """Return the mask over extra keys, which have the indices from -`num_extra` to -1, and tokens."""

    def seen(b: Any, h: Any, q: Any, kv: Any) -> Any:
        is_extra = kv < 0
        token, other = kv.clamp(min=0), (kv + num_extra).clamp(max=num_extra - 1)
        return torch.where(is_extra, of_extra(b, h, q, other), among_tokens(b, h, q, token))

    return seen
