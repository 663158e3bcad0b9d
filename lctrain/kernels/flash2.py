"""Run FlashAttention-2 from the package flash-attn 2.8, on Ampere or later.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim, T = B·L tokens.
"""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, ClassVar

from torch import Tensor

from lctrain.kernels.local import Alike, LocalKernel
from lctrain.kernels.varlen import older_than_ampere

INSTALL = "pip install --no-build-isolation 'lctrain[flash-attn]'"


class Flash2Kernel(LocalKernel):
    """FlashAttention-2 as its authors release it (`varlen` is torch's copy); needs the package flash-attn."""

    head_dims: ClassVar[Sequence[int]] = range(8, 257, 8)

    @classmethod
    def missing(cls) -> str | None:
        if not (installed_version() or "").startswith("2.8."):
            return f"needs flash-attn 2.8, built on the card's host: {INSTALL}"
        return older_than_ampere()

    def fused(
        self, part: Alike, scaling: float, q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor
    ) -> tuple[Tensor, Tensor]:
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        window = (-1 if part.window is None else part.window - 1, 0)
        # return_attn_probs gives the log-sum-exp too, and empty probabilities where there is no dropout.
        options: dict[str, Any] = {
            "softmax_scale": scaling, "causal": True, "window_size": window, "return_attn_probs": True
        }  # fmt: skip
        if part.cu_seqlens is None:
            out_BLHD, lse_BHL, _ = flash_attn_func(q_BLHD, k_BSKD, v_BSKD, **options)
            return out_BLHD, lse_BHL
        out_THD, lse_HT, _ = flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q_BLHD, k_BSKD, v_BSKD)), cu_seqlens_q=part.cu_seqlens,
            cu_seqlens_k=part.cu_seqlens, max_seqlen_q=part.max_length, max_seqlen_k=part.max_length, **options,
        )  # fmt: skip
        return out_THD[None], lse_HT[None]


def installed_version() -> str | None:
    """Return the version of the distribution flash-attn, None if it or its compiled part is missing.

    flash-attn-4 installs a folder `flash_attn` too, so a module of that name proves nothing.
    """
    try:
        return version("flash-attn") if find_spec("flash_attn_2_cuda") else None
    except PackageNotFoundError:
        return None
