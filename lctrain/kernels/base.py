"""The interface of a kernel.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class MaskShape:
    """The grid a mask is evaluated on. `batch` and `num_heads` are 1 where the mask does not depend on them."""

    batch: int
    num_heads: int
    num_key_value_groups: int
    q_length: int
    kv_length: int
    device: torch.device
    dtype: torch.dtype

    def evaluate(self, mask_mod: MaskMod, q: slice, kv: slice) -> Tensor:
        """The boolean mask [B, H, L, S] of one rectangle of the grid."""
        b, h = (torch.arange(n, device=self.device) for n in (self.batch, self.num_heads))
        q_idx, kv_idx = (torch.arange(s.start, s.stop, device=self.device) for s in (q, kv))
        mask = mask_mod(b[:, None, None, None], h[:, None, None], q_idx[:, None], kv_idx)
        return mask.expand(self.batch, self.num_heads, q_idx.numel(), kv_idx.numel())


class Kernel(ABC):
    """`prepare` turns a mask function into what this kernel runs on; None stands for plain causal."""

    supports_softcap: bool = True

    @abstractmethod
    def prepare(self, mask_mod: MaskMod, shape: MaskShape) -> Any:
        """Evaluate the mask once; the result serves all layers of a forward and its backward."""

    @abstractmethod
    def attend(
        self, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, prepared: Any, *, scaling: float, softcap: float | None
    ) -> Tensor:
        """softmax(softcap(scaling · q kᵀ) + mask) v, [B, H, L, D]. Keys and values are never repeated."""
