"""FlashAttention-4: causal attention in windows and groups by itself, any other mask through FlexAttention.

Sinks beside a window are added to it (`sinks`).

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim, T = B·L tokens.
"""

from functools import partial
from importlib.util import find_spec
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.kernels.base import HALF, Demand
from lctrain.kernels.block_mask import BLOCK
from lctrain.kernels.few_queries import FEW
from lctrain.kernels.flex import FlexKernel
from lctrain.kernels.mask import Local, Mask
from lctrain.kernels.sinks import Sinks, find_sinks, fits, with_sinks
from lctrain.kernels.together import together

HOPPER = 9  # compute capability; others are not tested here
HEAD_DIMS = (64, 96, 128, 256)  # forward and backward were compared with the reference for these


class Alike(NamedTuple):
    """Neighbouring heads that are local alike. `cu_seqlens` are where groups and documents begin, of T tokens."""

    num_heads: int
    num_key_value_heads: int
    window: int | None
    cu_seqlens: Tensor | None  # None where rows are whole
    max_length: int
    sinks: Sinks | None  # what a document's queries see behind their window


class FlashKernel(FlexKernel):
    """Needs the package flash-attn-4 and a Hopper card."""

    backend: ClassVar[str] = "FLASH"

    @classmethod
    def refusal(cls, demand: Demand) -> str | None:
        if reason := super().refusal(demand):
            return reason
        if not find_spec("flash_attn") or not find_spec("flash_attn.cute"):
            return "needs flash-attn-4: pip install 'lctrain[flash-attn-4]'"
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != HOPPER:
            return f"runs on Hopper, not on {torch.cuda.get_device_name()}; use kernel=auto"
        if demand.softcap is not None:
            return "can't cap attention scores as this model does; use kernel=auto"
        if demand.dtype not in HALF or demand.head_dim not in HEAD_DIMS:
            return (
                f"needs bfloat16 or float16 and head dimensions of {', '.join(map(str, HEAD_DIMS))}, "
                f"not {demand.dtype} and {demand.head_dim}"
            )
        return None

    def prepare(self, mask: Mask) -> Any:
        few = mask.q_length < FEW and not mask.square
        alike = None if mask.local is None or few else _alike(mask, mask.local)
        return super().prepare(mask) if alike is None else alike

    def attend(
        self, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, prepared: Any, *, scaling: float, softcap: float | None
    ) -> Tensor:
        if not isinstance(prepared, list):
            return super().attend(q_BHLD, k_BKSD, v_BKSD, prepared, scaling=scaling, softcap=softcap)
        if len(prepared) == 1:  # which may stand for heads of any number
            return _attend(prepared[0], scaling, *(x.transpose(1, 2) for x in (q_BHLD, k_BKSD, v_BKSD)))
        heads, kv_heads = ([part.num_heads for part in prepared], [part.num_key_value_heads for part in prepared])

        def calls(*qkv: Tensor) -> list[Tensor]:
            # Split by token: so their gradients are laid out, and joined as they are.
            split = (x.transpose(1, 2).split(n, 2) for x, n in zip(qkv, (heads, kv_heads, kv_heads), strict=True))
            return [_attend(part, scaling, *own) for part, *own in zip(prepared, *split, strict=True)]

        return together(calls, q_BHLD, k_BKSD, v_BKSD)

    def kv_block(self, head_dim: int) -> int:
        """What the kernel loads at once, which a block must equal."""
        return BLOCK if head_dim <= 128 else 64


def _attend(part: Alike, scaling: float, q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> Tensor:
    """The output [B, H, L, D]."""
    rows = q_BLHD.shape[:2]
    if part.cu_seqlens is not None:  # of all rows, as of one
        q_BLHD, k_BSKD, v_BSKD = (x.flatten(0, 1)[None] for x in (q_BLHD, k_BSKD, v_BSKD))
    attend = partial(_fused, part, scaling)
    if part.sinks is None:
        out_BLHD, _ = attend(q_BLHD, k_BSKD, v_BSKD)
    else:
        out_BLHD = with_sinks(attend, part.sinks, q_BLHD, k_BSKD, v_BSKD, scaling)
    out: Tensor = out_BLHD.flatten(0, 1).unflatten(0, rows).transpose(1, 2)
    return out


def _fused(part: Alike, scaling: float, q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor) -> tuple[Tensor, Tensor]:
    """The output [B, L, H, D] and each query's log-sum-exp [B, H, L]."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    window = (None if part.window is None else part.window - 1, 0)
    options: dict[str, Any] = {"softmax_scale": scaling, "causal": True, "window_size": window, "return_lse": True}
    if part.cu_seqlens is None:
        out_BLHD, lse_BHL = flash_attn_func(q_BLHD, k_BSKD, v_BSKD, **options)
        return out_BLHD, lse_BHL
    out_THD, lse_HT = flash_attn_varlen_func(
        q_BLHD[0], k_BSKD[0], v_BSKD[0], cu_seqlens_q=part.cu_seqlens, cu_seqlens_k=part.cu_seqlens,
        max_seqlen_q=part.max_length, max_seqlen_k=part.max_length, **options,
    )  # fmt: skip
    return out_THD[None], lse_HT[None]


def _alike(mask: Mask, local: tuple[Local, ...]) -> list[Alike] | None:
    """None where heads that share a key-value head differ, for groups and sinks with some of their queries elsewhere,
    and for sinks that no program holds, that reach out of the window, or of documents that begin elsewhere.
    """
    # A window that covers the row has no need of sinks.
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
        window = own.window if own.window is not None and own.window < length else None
        if own.num_sinks and window is not None:
            if own.num_sinks > window or not fits(own.num_sinks, mask.head_dim) or not _begin_at_zero(mask, cu_seqlens):
                return None
            starts = torch.tensor([0, mask.kv_length]) if cu_seqlens is None else cu_seqlens.cpu()
            sinks = find_sinks(own.num_sinks, window, starts, mask.device)
        parts.append(Alike(num * shared, num, window, cu_seqlens, length, sinks))
    return parts


def _begin_at_zero(mask: Mask, cu_seqlens: Tensor | None) -> bool:
    """Whether the first tokens of a document are those of the first positions."""
    if mask.positions is None:
        return True
    positions_BL = mask.positions[0].expand(mask.num_rows, -1)
    first = positions_BL[:, 0] if cu_seqlens is None else positions_BL.flatten()[cu_seqlens[:-1].long()]
    return not first.any()


def _cu_seqlens(mask: Mask, local: Local) -> Tensor | None:
    """The index of each group's or document's first token among those of all rows, and their number at the end."""
    if mask.documents is None and local.group is None:
        return None
    index = torch.arange(mask.q_length, device=mask.device)[None]
    begins = index == 0  # a row
    if mask.documents is not None:
        begins = begins | F.pad(mask.documents[0].diff(dim=1) != 0, (1, 0), value=True)
    if local.group is not None:
        position = index if mask.positions is None else mask.positions[0]
        begins = begins | ((position + local.shift) % local.group == 0)
    begins = begins.expand(mask.num_rows, -1).flatten()
    return F.pad(begins.nonzero()[:, 0], (0, 1), value=begins.numel()).to(torch.int32)
