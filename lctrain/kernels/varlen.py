"""Run FlashAttention-2 as torch ships it, on Ampere or later, without another package.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim, T = B·L tokens.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from lctrain.kernels.local import Alike, LocalKernel

AMPERE = (8, 0)  # compute capability


class VarlenKernel(LocalKernel):
    """A kernel by torch's `varlen_attn`: attention over pieces of any length, in a window."""

    head_dims: ClassVar[Sequence[int]] = range(8, 257, 8)

    @classmethod
    def missing(cls) -> str | None:
        if not torch.cuda.is_available():
            return None
        if not torch.backends.cuda.is_flash_attention_available():
            return "needs a torch that was built with FlashAttention; use kernel=auto"
        return older_than_ampere()

    def fused(
        self, part: Alike, scaling: float, q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor
    ) -> tuple[Tensor, Tensor]:
        (cu_seqlens_q, longest_q), (cu_seqlens_k, longest_k) = (_lengths(part, x) for x in (q_BLHD, k_BSKD))
        # torch 2.11 accepts query heads that share a key-value head as they are; later versions need this option.
        options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
        q_THD, k_TKD, v_TKD = (x.flatten(0, 1) for x in (q_BLHD, k_BSKD, v_BSKD))
        out_THD, lse_HT = varlen_attn(
            q_THD, k_TKD, v_TKD, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, scale=scaling,
            window_size=(-1 if part.window is None else part.window - 1, 0), return_aux=AuxRequest(lse=True), **options,
        )  # fmt: skip
        rows = q_BLHD.shape[:2]
        return out_THD.unflatten(0, rows), lse_HT.unflatten(1, rows).transpose(0, 1)


def _lengths(part: Alike, x_BLHD: Tensor) -> tuple[Tensor, int]:
    """Return the index at which each row, group or document begins, with the total at the end, and the most tokens."""
    if part.cu_seqlens is not None:
        return part.cu_seqlens, part.max_length
    num_rows, length = x_BLHD.shape[:2]
    return torch.arange(0, num_rows * length + 1, length, dtype=torch.int32, device=x_BLHD.device), length


def older_than_ampere() -> str | None:
    """Return the refusal of a card that FlashAttention-2 does not run on."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < AMPERE:
        return f"runs from Ampere on, not on {torch.cuda.get_device_name()}; use kernel=auto"
    return None
