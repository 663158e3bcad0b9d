"""Change the base."""

from dataclasses import dataclass
from typing import Any

from lctrain.errors import InputError
from lctrain.rope.base import RopeContext, RopeScheme


@dataclass(frozen=True, kw_only=True)
class BaseChange(RopeScheme):
    """A given `rope_theta` (adjusted base frequency, Xiong et al., arXiv:2309.16039), as in Code Llama and ProLong."""

    rope_theta: float

    def __post_init__(self) -> None:
        if self.rope_theta <= 1:
            raise InputError(f"rope.rope_theta must be above 1, got {self.rope_theta}")

    def parameters(self, context: RopeContext) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": float(self.rope_theta)}
