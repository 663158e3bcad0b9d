"""Scale as YaRN does."""

from dataclasses import dataclass
from typing import Any

from lctrain.errors import InputError
from lctrain.rope.base import Factor, RopeContext, RopeScheme


@dataclass(frozen=True, kw_only=True)
class YaRN(RopeScheme):
    """NTK-by-parts interpolation and an attention temperature (YaRN, Peng et al., arXiv:2309.00071, eq. 17-23).

    Dimensions that rotate more than `beta_fast` times within the original length stay, those that rotate fewer than
    `beta_slow` times are interpolated by `factor`, and a ramp connects the two. `attention_factor` scales the
    embeddings; null is the paper's 0.1 ln(factor) + 1.
    """

    factor: Factor = "auto"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.beta_slow < self.beta_fast:
            raise InputError(f"rope.beta_fast must be above rope.beta_slow, got {self.beta_fast} and {self.beta_slow}")

    def parameters(self, context: RopeContext) -> dict[str, Any]:
        parameters = {
            "rope_type": "yarn",
            "factor": context.scale(self.factor),
            "original_max_position_embeddings": context.original_max_position_embeddings,
            "beta_fast": float(self.beta_fast),
            "beta_slow": float(self.beta_slow),
        }
        return parameters | (
            {} if self.attention_factor is None else {"attention_factor": float(self.attention_factor)}
        )
