"""Keys that a query sees on average, from a sample of queries, against a count of every pair."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from lctrain.attention.base import MaskedAttention
from lctrain.attention.full import FullAttention
from lctrain.attention.shifted_sparse import ShiftedSparseAttention
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.attention.streaming import StreamingAttention
from lctrain.memory.savings import NOTHING
from lctrain.plan.flops import SAMPLED_QUERIES, attention_flops, layer_layout, visible_keys
from lctrain.plan.memory import StepMemory, _masks
from lctrain.plan.simulation import Step

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


@dataclass(frozen=True)
class Window(MaskedAttention):
    """A window whose repr does not tell its width, a number or a tensor."""

    width: object = field(repr=False)

    def visible(self, layout):
        return lambda b, h, q_pos, kv_pos: q_pos - kv_pos < self.width


@pytest.mark.parametrize("of", [int, torch.tensor], ids=["numbers", "tensors"])
def test_layers_are_told_apart_by_the_value_of_their_patterns(of):
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4, hidden_size=32)
    widths = [50, 100, 150, 200]
    method = SimpleNamespace(parts=lambda layout: [(Window(of(widths[layout.layer_idx])), 4)])
    keys = [visible_keys(SlidingWindowAttention(sliding_window=w), config, 1000, 0) for w in widths]
    assert attention_flops(config, method, 1000) == pytest.approx(4 * 8 * 4 * sum(keys))
    step = Step(rows=1, length=1024, kernel="flex", autocast=False, num_devices=1)
    assert _masks(config, method, step, NOTHING, 4) == 4 * 4 * 4 * (1024 // 128) ** 2
    memory = StepMemory.__new__(StepMemory)
    memory._method, memory._step = method, step
    assert len(set(memory._kinds(config))) == 4
