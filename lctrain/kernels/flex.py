"""Run FlexAttention, which compiles the mask function into a block-sparse kernel (CUDA)."""

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lctrain.kernels.base import Demand, Kernel
from lctrain.kernels.block_mask import BLOCK, block_mask
from lctrain.kernels.few_queries import FEW, FewQueries, attend_few
from lctrain.kernels.mask import Mask
from lctrain.kernels.reference import ReferenceKernel

RECOMPILE_LIMIT = 64  # shapes in one process: the lengths of a curriculum, of evaluation and of decoding


@cache
def _compiled(backend: str, softcap: float | None) -> Any:
    """Return FlexAttention compiled for `backend` and `softcap`, with static shapes: a curriculum has few of them."""

    def cap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scaling: float) -> Any:
        score_mod = cap if softcap is not None else None
        options: Any = {"BACKEND": backend}
        return flex_attention(
            q, k, v, score_mod=score_mod, block_mask=mask, scale=scaling, enable_gqa=True, kernel_options=options
        )

    # After too many recompilations torch would run eagerly, which holds all scores; fullgraph makes that an error.
    compiled = torch.compile(run, dynamic=False, fullgraph=True)
    return torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT)(compiled)


class FlexKernel(Kernel):
    """A kernel that skips the blocks which the mask leaves empty. `backend` is FlexAttention's name for its code."""

    backend: ClassVar[str] = "TRITON"

    @classmethod
    def refusal(cls, demand: Demand) -> str | None:
        return "needs a CUDA device; use kernel=auto" if demand.device_type != "cuda" else None

    def prepare(self, mask: Mask) -> Any:
        if mask.q_length < FEW:
            return FewQueries(ReferenceKernel().prepare(mask))
        return block_mask(mask, self.kv_block(mask.head_dim))

    def attend(
        self, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, prepared: Any, *, scaling: float, softcap: float | None
    ) -> Tensor:
        if isinstance(prepared, FewQueries):
            if softcap is None:
                return attend_few(q_BHLD, k_BKSD, v_BKSD, prepared.mask, scaling)
            return ReferenceKernel().attend(q_BHLD, k_BKSD, v_BKSD, prepared.mask, scaling=scaling, softcap=softcap)
        out: Tensor = _compiled(self.backend, softcap)(q_BHLD, k_BKSD, v_BKSD, prepared, scaling)
        return out

    def kv_block(self, head_dim: int) -> int:
        """Return the number of keys in a block."""
        return BLOCK
