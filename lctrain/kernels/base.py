"""Define the interface of a kernel.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lctrain.kernels.mask import Mask

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The requirements of a model that a kernel must meet. `dtype` is that of queries, keys and values."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    softcap: float | None


class Kernel(ABC):
    """An implementation of attention.

    `prepare` converts a mask to this kernel's own form, once per forward; `attend` uses the result in every layer.
    """

    @classmethod
    @abstractmethod
    def refusal(cls, demand: Demand) -> str | None:
        """Return why this kernel can't meet `demand` here, and what to install or use instead; None if it can."""

    @abstractmethod
    def prepare(self, mask: Mask) -> Any:
        """Return `mask` in this kernel's own form, for all layers of a forward and its backward."""

    @abstractmethod
    def attend(
        self, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, prepared: Any, *, scaling: float, softcap: float | None
    ) -> Tensor:
        """Return softmax(softcap(scaling · q kᵀ) + mask) v, [B, H, L, D], without repeating keys or values."""
