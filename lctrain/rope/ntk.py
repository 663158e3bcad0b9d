"""Scale by the NTK-aware rule."""

from dataclasses import dataclass
from typing import Any

from lctrain.rope.base import Factor, RopeContext, RopeScheme


@dataclass(frozen=True, kw_only=True)
class NTKAwareScaling(RopeScheme):
    """A larger base, so that the slowest frequency is interpolated by `factor` and the fastest not at all.

    base' = base · factor^(d / (d - 2)), with d rotated dimensions (bloc97, 2023; YaRN, arXiv:2309.00071, §3.1).
    """

    factor: Factor = "auto"

    def parameters(self, context: RopeContext) -> dict[str, Any]:
        exponent = context.dim / (context.dim - 2)
        return {"rope_type": "default", "rope_theta": context.rope_theta * context.scale(self.factor) ** exponent}
