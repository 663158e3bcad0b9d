"""Run FlashAttention-4 on Hopper (package flash-attn-4), and FlexAttention's backend FLASH on masks that are not local.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim, T = B·L tokens.
"""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lctrain.kernels.block_mask import BLOCK
from lctrain.kernels.local import Alike, LocalKernel

HOPPER = 9  # compute capability; others are not tested here
REINSTALL = "pip install --force-reinstall --no-deps 'flash-attn-4==4.0.0b36'"


class FlashKernel(LocalKernel):
    """FlashAttention-4, the fastest attention on Hopper; needs the package flash-attn-4."""

    backend: ClassVar[str] = "FLASH"
    head_dims: ClassVar[Sequence[int]] = (64, 96, 128, 256)  # output and gradients were compared with the reference

    @classmethod
    def missing(cls) -> str | None:
        whole = has_flash_attn_4()
        if whole is None:
            return "needs flash-attn-4: pip install 'lctrain[flash-attn-4]'"
        if not whole:
            return f"finds flash-attn-4 overwritten by flash-attn 2, which shares its folder: {REINSTALL}"
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != HOPPER:
            return f"runs on Hopper, not on {torch.cuda.get_device_name()}; use kernel=auto"
        return None

    def fused(
        self, part: Alike, scaling: float, q_BLHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor
    ) -> tuple[Tensor, Tensor]:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

        window = (None if part.window is None else part.window - 1, 0)
        options: dict[str, Any] = {"softmax_scale": scaling, "causal": True, "window_size": window, "return_lse": True}
        if part.cu_seqlens is None:
            out_BLHD, lse_BHL = flash_attn_func(q_BLHD, k_BSKD, v_BSKD, **options)
            return out_BLHD, lse_BHL
        out_THD, lse_HT = flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q_BLHD, k_BSKD, v_BSKD)), cu_seqlens_q=part.cu_seqlens,
            cu_seqlens_k=part.cu_seqlens, max_seqlen_q=part.max_length, max_seqlen_k=part.max_length, **options,
        )  # fmt: skip
        return out_THD[None], lse_HT[None]

    def kv_block(self, head_dim: int) -> int:
        """Return the number of keys that the kernel loads at once, which the block size must equal."""
        return BLOCK if head_dim <= 128 else 64


def has_flash_attn_4() -> bool | None:
    """Return whether flash-attn-4's own files are in place, None if it is not installed.

    flash-attn 2.8 ships an older `flash_attn/cute`, so a module of that name proves nothing; where both packages are
    installed, the later one has overwritten the files.
    """
    try:
        files = [file for file in distribution("flash-attn-4").files or [] if file.name == "interface.py"]
    except PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files]
    return all(path.is_file() and path.stat().st_size == file.size for path, file in zip(paths, files, strict=True))
