"""Leave the positions as they are."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from lctrain.rope.base import RopeContext, RopeScheme


@dataclass(frozen=True, kw_only=True)
class NoScaling(RopeScheme):
    """The model's own rotary scheme, to the last entry.

    Training beyond the length that the model came with is refused, unless `extrapolate` says that it is meant.
    """

    extrapolate: bool = False

    def parameters(self, context: RopeContext) -> dict[str, Any]:
        return {}

    def apply(self, config: PreTrainedConfig, target_length: int) -> None:
        """Nothing to write: a model without rotary positions is welcome too."""
