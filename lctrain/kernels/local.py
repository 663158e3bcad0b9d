"""Compute windows, groups, packed documents and sinks by calls of one fused function, without a mask.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim, T = B·L tokens.
"""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.kernels.base import HALF, Demand
from lctrain.kernels.few_queries import FEW
from lctrain.kernels.flex import FlexKernel
from lctrain.kernels.joined_calls import joined_calls
from lctrain.kernels.mask import Local, Mask
from lctrain.kernels.sinks import Sinks, find_sinks, fits, with_sinks


class Alike(NamedTuple):
    """Neighbouring heads with the same `Local`, which one call computes."""

    num_heads: int
    num_key_value_heads: int
    window: int | None
    cu_seqlens: Tensor | None  # index among T tokens at which each group or document begins; None: rows are undivided
    max_length: int  # of a group or document
    sinks: Sinks | None  # keys that a document's queries see beside their window


class LocalKernel(FlexKernel):
    """A kernel that computes what `Local` describes by `fused`, and any other mask by FlexAttention."""

    head_dims: ClassVar[Sequence[int]]  # head dimensions that give right outputs and gradients

    @classmethod
    @abstractmethod
    def missing(cls) -> str | None:
        """Return what the machine lacks, in words that follow the kernel's name; None if it lacks nothing."""

    @abstractmethod
    def fused(
        self, part: Alike, scaling: float, q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the causal output [B, L, H, D] inside the window and each query's natural log-sum-exp [B, H, L].

        The last query is aligned with the last key. B is 1 where `part.cu_seqlens` divides the tokens. The backward
        must read both results from the tensors returned here, because sinks are added to them in place (`sinks.py`).
        """

    @classmethod
    def refusal(cls, demand: Demand) -> str | None:
        if reason := super().refusal(demand) or cls.missing():
            return reason
        if demand.softcap is not None:
            return "can't cap attention scores as this model does; use kernel=auto"
        if demand.dtype not in HALF or demand.head_dim not in cls.head_dims:
            return (
                f"needs bfloat16 or float16 and head dimensions {_described(cls.head_dims)}, "
                f"not {demand.dtype} and {demand.head_dim}"
            )
        return None

    def prepare(self, mask: Mask) -> Any:
        few = mask.q_length < FEW and not mask.square
        parts = None if mask.local is None or few else alike(mask, mask.local)
        return super().prepare(mask) if parts is None else parts

    def attend(
        self, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, prepared: Any, *, scaling: float, softcap: float | None
    ) -> Tensor:
        if not isinstance(prepared, list):
            return super().attend(q_BHLD, k_BKSD, v_BKSD, prepared, scaling=scaling, softcap=softcap)
        if len(prepared) == 1:  # all heads, whatever its num_heads: a mask lists heads that are all alike once
            return self._attend(prepared[0], scaling, *(x.transpose(1, 2) for x in (q_BHLD, k_BKSD, v_BKSD)))
        heads, kv_heads = ([part.num_heads for part in prepared], [part.num_key_value_heads for part in prepared])

        def calls(*qkv: Tensor) -> list[Tensor]:
            # Split in token layout: the gradients then have this layout, and are joined without another copy.
            split = (x.transpose(1, 2).split(n, 2) for x, n in zip(qkv, (heads, kv_heads, kv_heads), strict=True))
            return [self._attend(part, scaling, *own) for part, *own in zip(prepared, *split, strict=True)]

        return joined_calls(calls, q_BHLD, k_BKSD, v_BKSD)

    def _attend(self, part: Alike, scaling: float, q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
        """Return the output [B, H, L, D] of one part."""
        rows = q_BLHD.shape[:2]
        if part.cu_seqlens is not None:  # it counts the tokens of all rows, joined into one
            q_BLHD, k_BSKD, v_BSKD = (x.flatten(0, 1)[None] for x in (q_BLHD, k_BSKD, v_BSKD))
        fused = partial(self.fused, part, scaling)
        if part.sinks is None:
            out_BLHD, _ = fused(q_BLHD, k_BSKD, v_BSKD)
        else:
            out_BLHD = with_sinks(fused, part.sinks, q_BLHD, k_BSKD, v_BSKD, scaling)
        out: Tensor = out_BLHD.flatten(0, 1).unflatten(0, rows).transpose(1, 2)
        return out


def _described(head_dims: Sequence[int]) -> str:
    if isinstance(head_dims, range):
        return f"up to {head_dims[-1]} that {head_dims.step} divides"
    return f"of {', '.join(map(str, head_dims))}"


def alike(mask: Mask, local: tuple[Local, ...]) -> list[Alike] | None:
    """Return the heads of `mask` as parts that one call computes each; None where `fused` can't compute them.

    It can't where heads that share a key-value head differ, or where there are groups or sinks and not every token is
    a query. Nor can it compute sinks that no program has room for, that are more than the window, or of documents
    that don't begin at position 0.
    """
    # A window that covers the row needs no sinks.
    local = tuple(Local() if one.is_causal(mask.kv_length) else one for one in local)
    shared = mask.num_key_value_groups
    by_kv_head = [local[i : i + shared] for i in range(0, len(local), shared)]
    if any(len(set(heads)) > 1 for heads in by_kv_head):
        return None
    if not mask.square and any(one.group is not None or one.num_sinks for one in local):
        return None
    parts = []
    for (own, *_), same in groupby(by_kv_head):
        num, cu_seqlens, sinks = len(list(same)), _cu_seqlens(mask, own), None
        length = mask.kv_length if own.group is None else min(own.group, mask.kv_length)
        # Compared with the row, not with its documents: a batch of short documents must not compile another kernel.
        window = own.window if own.window is not None and own.window < length else None
        if own.num_sinks and window is not None:
            held = own.num_sinks <= window and fits(own.num_sinks, mask.head_dim, mask.device)
            if not held or not _begin_at_zero(mask, cu_seqlens):
                return None
            starts = torch.tensor([0, mask.kv_length]) if cu_seqlens is None else cu_seqlens.cpu()
            sinks = find_sinks(own.num_sinks, window, starts, mask.device)
        longest = length if cu_seqlens is None else int(cu_seqlens.diff().max())
        parts.append(Alike(num * shared, num, window, cu_seqlens, longest, sinks))
    return parts


def _begin_at_zero(mask: Mask, cu_seqlens: Tensor | None) -> bool:
    """Return whether the first token of every document has position 0."""
    if mask.positions is None:
        return True
    positions_BL = mask.positions[0].expand(mask.num_rows, -1)
    first = positions_BL[:, 0] if cu_seqlens is None else positions_BL.flatten()[cu_seqlens[:-1].long()]
    return not first.any()


def _cu_seqlens(mask: Mask, local: Local) -> Tensor | None:
    """Return the index of each group's or document's first token among the tokens of all rows, then their total.

    None where neither groups nor documents divide the rows.
    """
    if mask.documents is None and local.group is None:
        return None
    index = torch.arange(mask.q_length, device=mask.device)[None]
    begins = index == 0  # where a row begins
    if mask.documents is not None:
        begins = begins | F.pad(mask.documents[0].diff(dim=1) != 0, (1, 0), value=True)
    if local.group is not None:
        position = index if mask.positions is None else mask.positions[0]
        begins = begins | ((position + local.shift) % local.group == 0)
    begins = begins.expand(mask.num_rows, -1).flatten()
    return F.pad(begins.nonzero()[:, 0], (0, 1), value=begins.numel()).to(torch.int32)
