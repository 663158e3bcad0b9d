"""The definition of attention, materialised: what every other kernel is compared with."""

import torch
from torch import Tensor

from lctrain.kernels.base import Kernel, MaskMod, MaskShape


class ReferenceKernel(Kernel):
    """Scores and softmax in fp32, or fp64 for fp64 inputs; memory grows with L·S."""

    def prepare(self, mask_mod: MaskMod, shape: MaskShape) -> Tensor:
        return shape.evaluate(mask_mod, slice(0, shape.q_length), slice(0, shape.kv_length))

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
        L, S = q_BHLD.shape[2], k_BKSD.shape[2]
        mask = prepared if prepared is not None else q_BHLD.new_ones(1, 1, L, S, dtype=torch.bool).tril(S - L)
        dtype = torch.promote_types(q_BHLD.dtype, torch.float32)
        groups = k_BKSD.shape[1]
        q_BKGLD = q_BHLD.to(dtype).unflatten(1, (groups, -1))
        scores = torch.einsum("bkgld,bksd->bkgls", q_BKGLD, k_BKSD.to(dtype)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        mask_BKGLS = mask.expand(-1, q_BHLD.shape[1], -1, -1).unflatten(1, (groups, -1))
        weights = scores.masked_fill(~mask_BKGLS, float("-inf")).softmax(dim=-1)
        return torch.einsum("bkgls,bksd->bkgld", weights, v_BKSD.to(dtype)).flatten(1, 2).to(q_BHLD.dtype)
