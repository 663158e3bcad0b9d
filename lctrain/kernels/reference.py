"""Compute attention by its definition, with all scores in memory; every other kernel is compared with this one."""

import torch
from torch import Tensor

from lctrain.kernels.base import Demand, Kernel
from lctrain.kernels.mask import Mask


class ReferenceKernel(Kernel):
    """A kernel with scores and softmax in fp32, or fp64 for fp64 inputs; its memory grows with L·S."""

    @classmethod
    def refusal(cls, demand: Demand) -> str | None:
        return None

    def prepare(self, mask: Mask) -> Tensor | None:
        if mask.causal and mask.q_length == 1:
            return None
        return mask.evaluate(slice(0, mask.q_length), slice(0, mask.kv_length))

    def attend(
        self,
        q_BHLD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        prepared: Tensor | None,
        *,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Return the output [B, H, L, D], as every kernel does; with `prepared` None, every query sees every key."""
        dtype = torch.promote_types(q_BHLD.dtype, torch.float32)
        groups = k_BKSD.shape[1]
        q_BKGLD = q_BHLD.to(dtype).unflatten(1, (groups, -1))
        scores = torch.einsum("bkgld,bksd->bkgls", q_BKGLD, k_BKSD.to(dtype)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if prepared is not None:
            mask_BKGLS = prepared.expand(-1, q_BHLD.shape[1], -1, -1).unflatten(1, (groups, -1))
            scores = scores.masked_fill(~mask_BKGLS, float("-inf"))
        weights = scores.softmax(dim=-1)
        return torch.einsum("bkgls,bksd->bkgld", weights, v_BKSD.to(dtype)).flatten(1, 2).to(q_BHLD.dtype)
