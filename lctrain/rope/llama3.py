"""Scale as Llama 3.1 does."""

from dataclasses import dataclass
from typing import Any

from lctrain.errors import InputError
from lctrain.rope.base import Factor, RopeContext, RopeScheme


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScheme):
    """Llama 3.1's scaling by wavelength (arXiv:2407.21783, and its released code).

    Wavelengths above original / `low_freq_factor` are interpolated by `factor`, those below original /
    `high_freq_factor` stay, and a ramp connects the two.
    """

    factor: Factor = "auto"
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise InputError(
                "rope.high_freq_factor must be above rope.low_freq_factor, "
                f"got {self.high_freq_factor} and {self.low_freq_factor}"
            )

    def parameters(self, context: RopeContext) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "factor": context.scale(self.factor),
            "low_freq_factor": float(self.low_freq_factor),
            "high_freq_factor": float(self.high_freq_factor),
            "original_max_position_embeddings": context.original_max_position_embeddings,
        }
