"""Scale by dynamic NTK."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lctrain.rope.base import Factor, RopeContext, RopeScheme


@dataclass(frozen=True, kw_only=True)
class DynamicNTKScaling(RopeScheme):
    """NTK-aware scaling whose base depends on the length of the input (emozilla, 2023; arXiv:2309.00071, §3.3).

    base' = base · (factor · length / original - (factor - 1))^(d / (d - 2)) beyond the original length, with d rotated
    dimensions. Keys in a KV cache keep the base that they were rotated with, so decoding past the original length
    differs from one prefill.
    """

    keeps_max_position_embeddings: ClassVar[bool] = True
    factor: Factor = "auto"

    def parameters(self, context: RopeContext) -> dict[str, Any]:
        return {"rope_type": "dynamic", "factor": context.scale(self.factor)}
