"""Scale as LongRoPE does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lctrain.errors import InputError
from lctrain.rope.base import Factor, RopeContext, RopeScheme


@dataclass(frozen=True, kw_only=True)
class LongRoPE(RopeScheme):
    """LongRoPE, with one interpolation factor per rotated pair (Ding et al., arXiv:2402.13753).

    `short_factor` is for inputs up to the original length, `long_factor` for longer ones; both have d/2 entries. The
    paper finds them by a search. Where they are null, short is all ones, and long is the NTK-aware
    factor^(2i / (d - 2)), one of the points from which the paper's search starts.
    """

    factor: Factor = "auto"
    short_factor: Sequence[float] | None = None
    long_factor: Sequence[float] | None = None

    def parameters(self, context: RopeContext) -> dict[str, Any]:
        factor, pairs = context.scale(self.factor), context.dim // 2
        short = [1.0] * pairs if self.short_factor is None else list(self.short_factor)
        long = [factor ** (2 * i / (context.dim - 2)) for i in range(pairs)]
        long = long if self.long_factor is None else list(self.long_factor)
        for name, values in (("short_factor", short), ("long_factor", long)):
            if len(values) != pairs:
                raise InputError(f"rope.{name} needs {pairs} entries, one per rotated pair, got {len(values)}")
        return {
            "rope_type": "longrope",
            "factor": factor,
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": context.original_max_position_embeddings,
        }
