"""Shifted sparse attention (S²-Attn)."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from lctrain.attention.base import Layout, MaskedAttention, require_positive
from lctrain.errors import InputError
from lctrain.kernels.mask import Local, PositionMask


@dataclass(frozen=True, kw_only=True)
class ShiftedSparseAttention(MaskedAttention):
    """Attention inside groups, for half the heads shifted by half a group (LongLoRA, Chen et al., arXiv:2309.12307).

    With group size G, position p of an unshifted head belongs to group floor(p / G), of a shifted head to
    floor((p + G/2) / G). Give either `group_size` in tokens or `group_size_ratio` of the row's length.

    Deviations: the published code rolls the sequence, so its last half group attends into the first tokens; here the
    first and last half groups stand alone. With grouped-query attention the shifted half is the second half of the
    key-value heads, rounded down, and of the query heads that share them. Groups are counted inside each packed
    document. A ratio of 1 is full attention; a size in tokens means the same groups whatever the length, so that
    decoding and packing see what one pass over the document sees.
    """

    group_size_ratio: float | None = 0.25
    group_size: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, group_size_ratio=self.group_size_ratio, group_size=self.group_size)
        if (self.group_size_ratio is None) == (self.group_size is None):
            raise InputError("give one of attention.group_size_ratio and attention.group_size, set the other to null")
        if self.group_size_ratio is not None and self.group_size_ratio > 1:
            raise InputError(f"attention.group_size_ratio must be at most 1, got {self.group_size_ratio}")

    def visible(self, layout: Layout) -> PositionMask:
        if layout.decoding and self.group_size is None:
            raise InputError("attention.group_size_ratio has no meaning while decoding; set attention.group_size")
        if self.group_size_ratio == 1:  # one group: the shifted heads have nothing to bridge
            return lambda b, h, q_pos, kv_pos: kv_pos <= q_pos
        size = self._size(layout.length)
        first_shifted = _first_shifted(layout)

        def same_group(b, h, q_pos, kv_pos):  # type: ignore[no-untyped-def]
            shift = (h + layout.first_head >= first_shifted) * (size // 2)
            return (q_pos + shift) // size == (kv_pos + shift) // size

        return same_group

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:
        if config.num_key_value_heads == 1:
            raise InputError(
                f"shifted_sparse shifts half of the key-value heads, and {config.model_type} has one; choose another "
                "attention"
            )
        for length in lengths:
            size = self._exact_size(length)
            if size != int(size) or size < 1 or length % int(size) or (self.group_size_ratio != 1 and int(size) % 2):
                raise InputError(
                    f"a sequence of {length} tokens is not divisible into even groups of {size:g}; "
                    "change attention.group_size_ratio, attention.group_size or the sequence lengths"
                )

    def can_decode(self) -> bool:
        return self.group_size is not None

    def head_group(self, layout: Layout, head: int) -> bool:
        return self.group_size_ratio != 1 and head >= _first_shifted(layout)

    def local(self, layout: Layout, head: int) -> Local | None:
        if self.group_size_ratio == 1:
            return Local()
        size = self._size(layout.length)
        return Local(group=size, shift=size // 2 if self.head_group(layout, head) else 0)

    def _exact_size(self, length: int) -> float:
        # Rounded far below one token: 0.07 * 100 is 7.000000000000001 in floating point.
        return self.group_size or round(length * (self.group_size_ratio or 0), 6)

    def _size(self, length: int) -> int:
        return max(2, int(self._exact_size(length)))


def _first_shifted(layout: Layout) -> int:
    """Return the first query head of the shifted half of the key-value heads; an odd one in the middle stays."""
    width = layout.num_attention_heads // layout.num_key_value_heads
    return width * ((layout.num_key_value_heads + 1) // 2)
