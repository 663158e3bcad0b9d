"""FlexAttention: the mask function compiled into a block-sparse kernel (CUDA)."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lctrain.kernels.base import Kernel, MaskMod, MaskShape


@cache
def _compiled(softcap: float | None) -> Any:
    """One compiled function per softcap; shapes are static because a curriculum has few of them."""

    def cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    def run(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scaling: float) -> Any:
        score_mod = cap if softcap is not None else None
        return flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scaling, enable_gqa=True)

    return torch.compile(run, dynamic=False)


class FlexKernel(Kernel):
    """Skips the blocks that the mask empties; needs a CUDA device."""

    def prepare(self, mask_mod: MaskMod, shape: MaskShape) -> BlockMask:
        # Compiled, or the whole L×S grid would be materialised.
        return create_block_mask(
            mask_mod, shape.batch, shape.num_heads, shape.q_length, shape.kv_length, device=shape.device, _compile=True
        )

    def attend(
        self,
        q_BHLD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        prepared: BlockMask | None,
        *,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        if prepared is None:
            shape = MaskShape(
                batch=1,
                num_heads=1,
                num_key_value_groups=1,
                q_length=q_BHLD.shape[2],
                kv_length=k_BKSD.shape[2],
                device=q_BHLD.device,
                dtype=q_BHLD.dtype,
            )
            prepared = self.prepare(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, shape)
        out: Tensor = _compiled(softcap)(q_BHLD, k_BKSD, v_BKSD, prepared, scaling)
        return out
