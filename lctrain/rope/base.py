"""Define a rotary scheme by the `rope_parameters` with which transformers computes its frequencies.

All arithmetic is in transformers (fp32 angles, `ROPE_INIT_FUNCTIONS`), so plain transformers reproduces an exported
model.
"""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from transformers import PreTrainedConfig

from lctrain.errors import InputError

log = logging.getLogger(__name__)

Factor = float | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class RopeContext:
    """The values from which a scheme computes its parameters. Lengths are in tokens."""

    rope_theta: float
    dim: int  # rotated dimensions of a head
    original_max_position_embeddings: int
    target_length: int

    def scale(self, factor: Factor) -> float:
        """Return `factor` as a number; `auto` is target over original length, at least 1.

        Raises InputError for a factor below 1.
        """
        if factor == "auto":
            return max(1.0, self.target_length / self.original_max_position_embeddings)
        if not isinstance(factor, int | float) or factor < 1:
            raise InputError(f"rope.factor must be at least 1 or auto, got {factor}")
        return float(factor)


class RopeScheme(ABC):
    """A way to stretch the rotary positions of the layers that see globally."""

    keeps_max_position_embeddings: ClassVar[bool] = False  # True if transformers derives the scheme's lengths from it

    @abstractmethod
    def parameters(self, context: RopeContext) -> dict[str, Any]:
        """Return the entries of `config.rope_parameters` that replace the scheme of the pretrained model."""

    def apply(self, config: PreTrainedConfig, target_length: int) -> None:
        """Write the scheme into `config`, in place. Models with rope per layer type keep theirs on local layers.

        Raises InputError where the model, or its global layers, have no rotary positions.
        """
        text = config.get_text_config()
        rope = getattr(text, "rope_parameters", None)
        if not rope:
            raise InputError(f"{config.model_type} has no rotary positions to stretch; use rope=none")
        nested = rope.get("full_attention") if "full_attention" in rope else rope
        if not isinstance(nested, dict):
            raise InputError(f"{config.model_type} has no rotary positions on its global layers; use rope=none")
        if nested.get("rope_type", "default") != "default":
            log.info("rope: the model's own %s is replaced by %s", nested["rope_type"], self)
        context = _context(text, nested, target_length)
        kept = {key: nested[key] for key in ("rope_theta", "partial_rotary_factor") if key in nested}
        new = kept | self.parameters(context)
        text.rope_parameters = rope | {"full_attention": new} if nested is not rope else new
        original = context.original_max_position_embeddings
        text.max_position_embeddings = original if self.keeps_max_position_embeddings else max(target_length, original)


def _context(config: PreTrainedConfig, rope: dict[str, Any], target_length: int) -> RopeContext:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if rope.get("rope_type") == "linear":  # such a config has only the stretched length
        original = round(config.max_position_embeddings / rope["factor"])
    return RopeContext(
        rope_theta=rope["rope_theta"],
        dim=int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        original_max_position_embeddings=original,
        target_length=target_length,
    )
