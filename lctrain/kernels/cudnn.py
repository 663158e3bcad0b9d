"""Run cuDNN's fused attention on plain causal rows, and the kernel `varlen` on all else.

cuDNN's causal mask begins at the first key, so a chunk of queries after other keys takes torch's flash attention.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right

from lctrain.kernels.few_queries import FEW
from lctrain.kernels.mask import Mask
from lctrain.kernels.varlen import VarlenKernel


class CudnnKernel(VarlenKernel):
    """A kernel that runs, for each mask, the fastest attention that torch ships."""

    head_dims: ClassVar[Sequence[int]] = range(8, 129, 8)

    @classmethod
    def missing(cls) -> str | None:
        if torch.cuda.is_available() and not torch.backends.cudnn.is_available():
            return "needs a torch with cuDNN"
        return super().missing()

    def prepare(self, mask: Mask) -> Any:
        if not mask.causal or (mask.q_length < FEW and not mask.square):
            return super().prepare(mask)
        return None if mask.square else causal_lower_right(mask.q_length, mask.kv_length)

    def attend(
        self, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, prepared: Any, *, scaling: float, softcap: float | None
    ) -> Tensor:
        if isinstance(prepared, CausalBias):
            return F.scaled_dot_product_attention(q_BHLD, k_BKSD, v_BKSD, prepared, scale=scaling, enable_gqa=True)
        if prepared is not None:
            return super().attend(q_BHLD, k_BKSD, v_BKSD, prepared, scaling=scaling, softcap=softcap)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(
                q_BHLD, k_BKSD, v_BKSD, is_causal=True, scale=scaling, enable_gqa=True
            )
