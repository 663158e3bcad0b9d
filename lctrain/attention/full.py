"""Causal attention over everything before."""

from dataclasses import dataclass

from lctrain.attention.base import Layout, MaskedAttention
from lctrain.kernels.mask import Local, PositionMask


@dataclass(frozen=True, kw_only=True)
class FullAttention(MaskedAttention):
    """Every token sees all tokens before it in its document; a model's own sliding window stays."""

    def visible(self, layout: Layout) -> PositionMask:
        return lambda b, h, q_pos, kv_pos: kv_pos <= q_pos

    def local(self, layout: Layout, head: int) -> Local | None:
        return Local()
