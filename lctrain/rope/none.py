"""Leave the positions as they are."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from lctrain.rope.base import RopeContext, RopeScheme


@dataclass(frozen=True, kw_only=True)
class NoScaling(RopeScheme):
    """The model's own rotary scheme, unchanged.

    Training beyond the model's pretrained length is refused unless `extrapolate` is true.
    """

    extrapolate: bool = False

    def parameters(self, context: RopeContext) -> dict[str, Any]:
        return {}

    def apply(self, config: PreTrainedConfig, target_length: int) -> None:
        """Do nothing, so that models without rotary positions are accepted too."""
