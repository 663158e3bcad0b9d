"""cuDNN's fused attention for plain causal rows, FlexAttention for patterns.

Its causal mask begins at the first key: a chunk of queries behind other keys takes torch's flash attention.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right

from lctrain.kernels.base import HALF, Demand
from lctrain.kernels.few_queries import FEW
from lctrain.kernels.flex import FlexKernel
from lctrain.kernels.mask import Mask


class CudnnKernel(FlexKernel):
    """The fastest causal attention that torch brings along."""

    @classmethod
    def refusal(cls, demand: Demand) -> str | None:
        if reason := super().refusal(demand):
            return reason
        if torch.cuda.is_available() and not torch.backends.cudnn.is_available():
            return "needs a torch with cuDNN"
        if demand.softcap is not None:
            return "can't cap attention scores as this model does; use kernel=auto"
        if demand.dtype not in HALF or demand.head_dim > 128 or demand.head_dim % 8:
            return (
                "needs bfloat16 or float16 and head dimensions up to 128 that 8 divides, "
                f"not {demand.dtype} and {demand.head_dim}"
            )
        return None

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
