"""Sliding windows of several widths in one layer, divided among its heads or combined in each of them.

Shape legend: B batch, H query heads, h query heads that are here, K key-value heads, L queries, S keys, W widths,
D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lctrain.attention.base import Attention, Call, Layout, MaskedAttention, require_positive
from lctrain.attention.by_head import PatternOf, attend_by_head, parts_by_head
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.errors import InputError

COMBINE = ("heads", "projection")


class Projection(nn.Module):
    """A projection from the outputs of all windows to one output in each query head, at first the widest window's."""

    def __init__(self, num_attention_heads: int, num_widths: int, head_dim: int) -> None:
        super().__init__()
        widest_HWDD = torch.zeros(num_attention_heads, num_widths, head_dim, head_dim, dtype=torch.float32)
        widest_HWDD[:, -1] = torch.eye(head_dim)
        self.weight = nn.Parameter(widest_HWDD)

    def forward(self, outs_WBhLD: Sequence[Tensor], first_head: int) -> Tensor:
        """Return the combined output [B, h, L, D] of the query heads from `first_head` on."""
        weight_hWDD = self.weight[first_head : first_head + outs_WBhLD[0].shape[1]].to(outs_WBhLD[0].dtype)
        return torch.cat(list(outs_WBhLD), dim=-1) @ weight_hWDD.flatten(1, 2)


@dataclass(frozen=True, kw_only=True)
class HierarchicalWindows(Attention):
    """Sliding windows of ascending widths, so that a layer sees near tokens in detail and far ones too.

    With `combine=heads`, the key-value heads are divided into as many groups as there are widths, the first with the
    narrowest (as mixtures of widths by head do, Fu et al., arXiv:2406.14909). With `combine=projection`, every head
    attends once with each width, and a learned projection of its concatenated outputs gives the head's output:
    out = [out_1; …; out_W] P, where P begins as 0 for all but the widest window and the identity for that. So a model
    begins as sliding window attention of the widest width.

    Deviation: where windows of several widths are combined in the literature, each has queries, keys and values of its
    own, and one projection mixes all heads; here these are shared, and the projection works in each head, as the
    output projection after it mixes heads anyway.
    """

    sliding_windows: Sequence[int]
    combine: str

    def __post_init__(self) -> None:
        for width in self.sliding_windows:
            require_positive(self, sliding_windows=width)
        if len(self.sliding_windows) < 2 or sorted(set(self.sliding_windows)) != list(self.sliding_windows):
            raise InputError(f"attention.sliding_windows={list(self.sliding_windows)} must be two or more, ascending")
        if self.combine not in COMBINE:
            raise InputError(f"attention.combine={self.combine} is neither {' nor '.join(COMBINE)}")

    @cached_property
    def patterns(self) -> tuple[MaskedAttention, ...]:
        """Return the windows, the narrowest first."""
        return tuple(SlidingWindowAttention(sliding_window=width) for width in self.sliding_windows)

    @property
    def learns(self) -> bool:
        return self.combine == "projection"

    def child(self, config: PreTrainedConfig, layout: Layout) -> nn.Module:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Projection(config.num_attention_heads, len(self.patterns), head_dim)

    def attend(self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, call: Call) -> Tensor:
        if not self.learns:
            return attend_by_head(self._pattern_of(call.layout), q_BHLD, k_BKSD, v_BKSD, call)
        outs = [call.run(pattern, q_BHLD, k_BKSD, v_BKSD) for pattern in self.patterns]
        combined: Tensor = module.get_submodule(self.name)(outs, call.layout.first_head)
        return combined

    def parts(self, layout: Layout) -> Sequence[tuple[MaskedAttention, int]]:
        if not self.learns:
            return parts_by_head(self._pattern_of(layout), layout)
        return [(pattern, layout.num_attention_heads) for pattern in self.patterns]

    def _pattern_of(self, layout: Layout) -> PatternOf:
        return lambda kv_head: self.patterns[kv_head * len(self.patterns) // layout.num_key_value_heads]

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:
        if not self.learns and config.num_key_value_heads < len(self.patterns):
            raise InputError(
                f"attention.combine=heads divides key-value heads among {len(self.patterns)} widths, and the model has "
                f"{config.num_key_value_heads}; give fewer sliding_windows, or combine=projection"
            )
        if self.sliding_windows[-1] > lengths[-1]:
            raise InputError(
                f"attention.sliding_windows={list(self.sliding_windows)}: the widest is wider than the longest "
                f"sequence ({lengths[-1]}); use attention=full for a layer that sees everything"
            )
