"""Keys that a query sees on average, from a sample of queries, against a count of every pair."""

import pytest
import torch
from transformers import LlamaConfig

from lctrain.attention.full import FullAttention
from lctrain.attention.shifted_sparse import ShiftedSparseAttention
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.attention.streaming import StreamingAttention
from lctrain.plan.flops import SAMPLED_QUERIES, layer_layout, visible_keys

LENGTH = 4096
STRETCH = LENGTH // SAMPLED_QUERIES
PATTERNS = {
    "full": FullAttention(),
    "window": SlidingWindowAttention(sliding_window=500),
    "streaming": StreamingAttention(num_sink_tokens=16, recent_size=300),
    "a quarter": ShiftedSparseAttention(),
    **{
        f"groups of {size}": ShiftedSparseAttention(group_size_ratio=None, group_size=size)
        for size in (STRETCH // 2, STRETCH, 2 * STRETCH, 4 * STRETCH)
    },
}


@pytest.mark.parametrize("length", [LENGTH, 300, 1000])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_sample_of_queries_stands_for_all(name, length):
    pattern, config = PATTERNS[name], LlamaConfig(num_attention_heads=4, num_key_value_heads=2)
    layout, positions = layer_layout(config, length, 0), torch.arange(length)
    causal = positions <= positions[:, None]
    visible = pattern.visible(layout)
    seen = [
        visible(torch.tensor(0), torch.tensor(head), positions[:, None], positions).expand(length, length) & causal
        for head in range(4)
    ]
    exact = float(torch.stack(seen).sum()) / (4 * length)
    assert visible_keys(pattern, config, length, 0) == pytest.approx(exact, rel=0.02)
