"""FlashAttention-4: causal attention and windows by itself, any other mask through FlexAttention.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim, T = B·L tokens.
"""

from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.kernels.base import HALF, Demand
from lctrain.kernels.block_mask import BLOCK
from lctrain.kernels.few_queries import FEW
from lctrain.kernels.flex import FlexKernel
from lctrain.kernels.mask import Mask

HOPPER = 9  # compute capability; others are not tested here
HEAD_DIMS = (64, 96, 128, 256)  # forward and backward were compared with the reference for these


class Window(NamedTuple):
    """Causal attention, `size` tokens back, None for all; `cu_seqlens` are where documents begin, of T tokens.

    The last query is the last key's, where there are fewer.
    """

    size: int | None
    cu_seqlens: Tensor | None


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
        if mask.window is None or (mask.q_length < FEW and not mask.square):
            return super().prepare(mask)
        size = mask.window if mask.window < mask.kv_length else None
        return Window(size, None if mask.documents is None else _cu_seqlens(mask.documents[0]))

    def attend(
        self, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, prepared: Any, *, scaling: float, softcap: float | None
    ) -> Tensor:
        if not isinstance(prepared, Window):
            return super().attend(q_BHLD, k_BKSD, v_BKSD, prepared, scaling=scaling, softcap=softcap)
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        q, k, v = (x.transpose(1, 2) for x in (q_BHLD, k_BKSD, v_BKSD))
        size = (None if prepared.size is None else prepared.size - 1, 0)
        if prepared.cu_seqlens is None:
            out_BLHD, _ = flash_attn_func(q, k, v, softmax_scale=scaling, causal=True, window_size=size)
        else:
            starts, length = prepared.cu_seqlens, q.shape[1]  # no document is longer than a row
            out_THD, _ = flash_attn_varlen_func(
                *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=length,
                max_seqlen_k=length, softmax_scale=scaling, causal=True, window_size=size,
            )  # fmt: skip
            out_BLHD = out_THD.unflatten(0, q.shape[:2])
        out: Tensor = out_BLHD.transpose(1, 2)
        return out

    def kv_block(self, head_dim: int) -> int:
        """What the kernel loads at once, which a block must equal."""
        return BLOCK if head_dim <= 128 else 64


def _cu_seqlens(documents_RL: Tensor) -> Tensor:
    """The index of each document's first token among those of all rows, and their number at the end."""
    begins = F.pad(documents_RL.diff(dim=1) != 0, (1, 0), value=True).flatten()
    return F.pad(begins.nonzero()[:, 0], (0, 1), value=begins.numel()).to(torch.int32)
