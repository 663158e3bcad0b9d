"""BigBird's global, neighbouring and random blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lctrain.attention.base import Layout, MaskedAttention, require_positive
from lctrain.errors import InputError
from lctrain.kernels.columns import Columns
from lctrain.kernels.mask import PositionMask


@dataclass(frozen=True, kw_only=True)
class BigBird(MaskedAttention):
    """Global, neighbouring and random blocks of keys for each block of queries (Zaheer et al., arXiv:2007.14062, §2).

    A token in block i of its document sees the first `num_global_blocks`, the last `num_window_blocks` up to its own,
    and `num_random_blocks` of those between, or all of them where there are no more. Each query head of each layer
    draws its own from (`seed`, layer, head, i) alone, so that a row's blocks are the same whatever comes after it.

    Deviations: the paper's encoder also has global blocks at the end, neighbours on both sides, and global tokens that
    see everything; a causal model has none of them.
    """

    block_size: int
    num_global_blocks: int
    num_window_blocks: int
    num_random_blocks: int
    seed: int

    def __post_init__(self) -> None:
        require_positive(self, block_size=self.block_size, num_window_blocks=self.num_window_blocks)
        for name in ("num_global_blocks", "num_random_blocks"):
            if getattr(self, name) < 0:
                raise InputError(f"attention.{name} must not be negative, got {getattr(self, name)}")

    def visible(self, layout: Layout) -> PositionMask:
        size, first_head = self.block_size, layout.first_head
        drawn = Columns(self._draw(layout)) if self.num_random_blocks else None

        def global_near_or_drawn(b, h, q_pos, kv_pos):  # type: ignore[no-untyped-def]
            row, column = q_pos // size, kv_pos // size
            seen = (kv_pos < size * self.num_global_blocks) | (row - column < self.num_window_blocks)
            return seen if drawn is None else seen | drawn.hold(h + first_head, row, column)

        return global_near_or_drawn

    def _draw(self, layout: Layout) -> Tensor:
        """Return the random blocks [H, M, R] of every head and block of queries, -1 where there are fewer.

        R different ones of n, each set as likely as any other, by Floyd's algorithm (Bentley, CACM 30(9), 1987).
        """
        num_blocks, num_drawn = -(-layout.length // self.block_size), self.num_random_blocks
        heads = torch.arange(layout.num_attention_heads, device=layout.device)[:, None]
        rows = torch.arange(num_blocks, device=layout.device)
        num_between = (rows + 1 - self.num_window_blocks - self.num_global_blocks).clamp(min=0)
        chosen: list[Tensor] = []
        for entry in range(num_drawn):
            last = num_between - num_drawn + entry
            number = _mix(self.seed, layout.layer_idx, heads, rows, entry) % (last + 1).clamp(min=1)
            for before in chosen:
                number = torch.where(before == number, last, number)
            chosen.append(number)
        every = torch.arange(num_drawn, device=layout.device)
        every = torch.where(every < num_between[:, None], every, -1 - self.num_global_blocks)
        enough = (num_between >= num_drawn)[:, None]
        return torch.where(enough, torch.stack(chosen, dim=-1), every) + self.num_global_blocks

    def layer_group(self, layer_idx: int) -> int:
        return layer_idx if self.num_random_blocks else 0

    def head_group(self, layout: Layout, head: int) -> int:
        return head if self.num_random_blocks else 0

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:
        num_seen = self.num_global_blocks + self.num_window_blocks + self.num_random_blocks
        if num_seen * self.block_size > lengths[-1]:
            raise InputError(
                f"attention.block_size · {num_seen} global, window and random blocks = {num_seen * self.block_size} "
                f"is longer than the longest sequence ({lengths[-1]}); use attention=full"
            )


def _mix(*numbers: int | Tensor) -> Tensor:
    """Return a number from 0 to 2**62 that depends on all of `numbers`, and on nothing else, on any device."""
    mixed = torch.zeros((), dtype=torch.int64)
    for number in numbers:
        mixed = (mixed + number + 0x1E3779B97F4A7C15) * 0x3F58476D1CE4E5B9  # as SplitMix64, below 2**62
        mixed = (mixed ^ (mixed >> 30)) * 0x14D049BB133111EB
        mixed = mixed ^ (mixed >> 27)
    return mixed & (2**62 - 1)
