"""FlexAttention: the mask function compiled into a block-sparse kernel (CUDA)."""

from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lctrain.kernels.base import Kernel, MaskMod, MaskShape
from lctrain.kernels.reference import ReferenceKernel

MIN_QUERIES = 128  # fewer, as in decoding, are computed as they stand: a kernel for each length would be compiled
RECOMPILE_LIMIT = 64  # shapes a process may meet: a curriculum's lengths, evaluation's, decoding


@cache
def _compiled(softcap: float | None) -> Any:
    """One compiled function per softcap; shapes are static because a curriculum has few of them."""

    def cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    def run(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scaling: float) -> Any:
        score_mod = cap if softcap is not None else None
        return flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scaling, enable_gqa=True)

    # Past its limit of recompilations torch falls back to eager, which holds all scores: fullgraph makes that an error.
    compiled = torch.compile(run, dynamic=False, fullgraph=True)
    return torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT)(compiled)


class FlexKernel(Kernel):
    """Skips the blocks that the mask empties; plain causal attention goes to SDPA. Needs a CUDA device."""

    def prepare(self, mask_mod: MaskMod, shape: MaskShape) -> BlockMask | Tensor:
        if shape.q_length < MIN_QUERIES:
            return ReferenceKernel().prepare(mask_mod, shape)
        # Compiled, or the whole L×S grid would be materialised.
        return create_block_mask(
            mask_mod, shape.batch, shape.num_heads, shape.q_length, shape.kv_length, device=shape.device, _compile=True
        )

    def attend(
        self,
        q_BHLD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        prepared: BlockMask | Tensor | None,
        *,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        if isinstance(prepared, Tensor):
            return ReferenceKernel().attend(q_BHLD, k_BKSD, v_BKSD, prepared, scaling=scaling, softcap=softcap)
        if prepared is None and softcap is None:
            return F.scaled_dot_product_attention(
                q_BHLD, k_BKSD, v_BKSD, is_causal=True, scale=scaling, enable_gqa=True
            )
        if prepared is None:
            prepared = _causal(q_BHLD.shape[2], q_BHLD.device)
        out: Tensor = _compiled(softcap)(q_BHLD, k_BKSD, v_BKSD, prepared, scaling)
        return out


@lru_cache(maxsize=8)
def _causal(length: int, device: torch.device) -> BlockMask:
    """For capped scores, which SDPA can't compute: one mask per length of a curriculum."""

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx >= kv_idx

    return create_block_mask(causal, None, None, length, length, device=str(device), _compile=True)
