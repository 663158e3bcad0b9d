"""FlashAttention-4: causal attention in windows and groups by itself, any other mask through FlexAttention.

Sinks beside a window are added to it (`sinks`).

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim, T = B·L tokens.
"""

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
from lctrain.kernels.sinks import MAX_NUMBERS, Sinks, find_sinks, with_sinks
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
    sinks: Sinks | None


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
            return _attend(prepared[0], q_BHLD, k_BKSD, v_BKSD, scaling=scaling)
        heads, kv_heads = ([part.num_heads for part in prepared], [part.num_key_value_heads for part in prepared])

        def calls(*qkv: Tensor) -> list[Tensor]:
            # Split by token: so their gradients are laid out, and joined as they are.
            split = (x.transpose(1, 2).split(n, 2) for x, n in zip(qkv, (heads, kv_heads, kv_heads), strict=True))
            own = zip(prepared, *split, strict=True)
            return [_attend(part, *(x.transpose(1, 2) for x in of_part), scaling=scaling) for part, *of_part in own]

        return together(calls, q_BHLD, k_BKSD, v_BKSD)

    def kv_block(self, head_dim: int) -> int:
        """What the kernel loads at once, which a block must equal."""
        return BLOCK if head_dim <= 128 else 64


def _attend(part: Alike, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, *, scaling: float) -> Tensor:
    batch = q_BHLD.shape[0]
    q_THD, k_TKD, v_TKD = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHLD, k_BKSD, v_BKSD))

    def attend(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return _fused(part, batch, *qkv, scaling=scaling)

    if part.sinks is None:
        out_THD, _ = attend(q_THD, k_TKD, v_TKD)
    else:
        out_THD = with_sinks(attend, part.sinks, q_THD, k_TKD, v_TKD, scaling=scaling)
    return out_THD.unflatten(0, (batch, -1)).transpose(1, 2)  # type: ignore[no-any-return]


def _fused(
    part: Alike, batch: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp [B, H, L] of rows, which documents make one."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    window = (None if part.window is None else part.window - 1, 0)
    options: dict[str, Any] = {"softmax_scale": scaling, "causal": True, "window_size": window, "return_lse": True}
    if part.cu_seqlens is None:
        out_BLHD, lse_BHL = flash_attn_func(*(x.unflatten(0, (batch, -1)) for x in (q_THD, k_TKD, v_TKD)), **options)
        return out_BLHD.flatten(0, 1), lse_BHL
    out_THD, lse_HT = flash_attn_varlen_func(
        q_THD, k_TKD, v_TKD, cu_seqlens_q=part.cu_seqlens, cu_seqlens_k=part.cu_seqlens,
        max_seqlen_q=part.max_length, max_seqlen_k=part.max_length, **options,
    )  # fmt: skip
    return out_THD, lse_HT[None]


def _alike(mask: Mask, local: tuple[Local, ...]) -> list[Alike] | None:
    """None where heads that share a key-value head differ, for groups and sinks with some of their queries elsewhere,
    and for more sinks than a program or the window holds.
    """
    shared = mask.num_key_value_groups
    by_kv_head = [local[i : i + shared] for i in range(0, len(local), shared)]
    if any(len(set(heads)) > 1 for heads in by_kv_head):
        return None
    if not mask.square and any(one.group is not None or one.num_sinks for one in local):
        return None
    if any(one.num_sinks > (one.window or 0) or one.num_sinks * mask.head_dim > MAX_NUMBERS for one in local):
        return None
    parts = []
    for (own, *_), same in groupby(by_kv_head):
        num = len(list(same))
        length = mask.kv_length if own.group is None else min(own.group, mask.kv_length)
        window = own.window if own.window is not None and own.window < length else None
        cu_seqlens = _cu_seqlens(mask, own)
        sinks = None
        if own.num_sinks and window is not None:
            rows = torch.arange(2, dtype=torch.int32, device=mask.device) * mask.kv_length
            sinks = find_sinks(own.num_sinks, window, rows if cu_seqlens is None else cu_seqlens)
        parts.append(Alike(num * shared, num, window, cu_seqlens, length, sinks))
    return parts


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
