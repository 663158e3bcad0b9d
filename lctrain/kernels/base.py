"""The interface of a kernel.

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
    """What a model asks of a kernel. `dtype` is that of queries, keys and values."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    softcap: float | None


class Kernel(ABC):
    """`prepare` turns a mask into what this kernel runs on, once per forward; `attend` serves every layer with it."""

    @classmethod
    @abstractmethod
    def refusal(cls, demand: Demand) -> str | None:
        """Why this kernel can't do that here, and what to install or use instead; None if it can."""

    @abstractmethod
    def prepare(self, mask: Mask) -> Any:
        """What serves all layers of a forward and its backward."""

    @abstractmethod
    def attend(
        self, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, prepared: Any, *, scaling: float, softcap: float | None
    ) -> Tensor:
        """softmax(softcap(scaling · q kᵀ) + mask) v, [B, H, L, D]. Keys and values are never repeated."""
