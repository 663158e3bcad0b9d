"""Run different patterns for different key-value heads, each at its own cost.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lctrain.attention.base import Call, Layout, MaskedAttention

PatternOf = Callable[[int], MaskedAttention]
"""Key-value head of the whole layer → the pattern of the query heads that share it. Equal patterns run together."""


def attend_by_head(pattern_of: PatternOf, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, call: Call) -> Tensor:
    """Return the output [B, H, L, D] of the heads that are here."""
    num_kv_heads = k_BKSD.shape[1]
    width = q_BHLD.shape[1] // num_kv_heads  # query heads that share a key-value head here
    by_head = q_BHLD.split(width, 1), k_BKSD.split(1, 1), v_BKSD.split(1, 1)
    shared = _shared_by(call.layout)
    kv_heads = [(call.layout.first_head + i * width) // shared for i in range(num_kv_heads)]
    out: dict[int, Tensor] = {}
    for pattern, heads in _assignment(pattern_of, kv_heads):
        q, k, v = (torch.cat([x[head] for head in heads], dim=1) for x in by_head)
        out |= zip(heads, call.run(pattern, q, k, v).split(width, 1), strict=True)
    return torch.cat([out[head] for head in range(num_kv_heads)], dim=1)


def parts_by_head(pattern_of: PatternOf, layout: Layout) -> Sequence[tuple[MaskedAttention, int]]:
    """Return the patterns that run in a layer, each with its number of query heads."""
    assignment = _assignment(pattern_of, range(layout.num_key_value_heads))
    return [(pattern, len(heads) * _shared_by(layout)) for pattern, heads in assignment]


def _shared_by(layout: Layout) -> int:
    """Return how many query heads of the whole layer share a key-value head."""
    return layout.num_attention_heads // layout.num_key_value_heads


def _assignment(pattern_of: PatternOf, kv_heads: Sequence[int]) -> list[tuple[MaskedAttention, list[int]]]:
    """Return each pattern with the indices in `kv_heads` of the heads that run it."""
    patterns = [pattern_of(head) for head in kv_heads]
    different = [pattern for i, pattern in enumerate(patterns) if pattern not in patterns[:i]]
    return [(each, [i for i, pattern in enumerate(patterns) if pattern == each]) for each in different]
