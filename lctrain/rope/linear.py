"""Interpolate positions."""

from dataclasses import dataclass
from typing import Any

from lctrain.rope.base import Factor, RopeContext, RopeScheme


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScheme):
    """Position interpolation (Chen et al., arXiv:2306.15595): every angle divided by `factor`, θ_i' = θ_i / factor."""

    factor: Factor = "auto"

    def parameters(self, context: RopeContext) -> dict[str, Any]:
        return {"rope_type": "linear", "factor": context.scale(self.factor)}
