"""Count the floating-point operations that a step needs, and look up or measure a device's rate."""

import time
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from lctrain.attention.base import Attention, Cost, Layout, MaskedAttention
from lctrain.attention.full import FullAttention
from lctrain.attention.identity import kind
from lctrain.plan.cards import CARDS

SAMPLED_QUERIES = 64  # queries that represent all of a row's when query-key pairs are counted
GOLDEN_RATIO = (1 + 5**0.5) / 2  # the fractional parts of its multiples spread evenly over [0, 1)


def device_peak_flops(device: torch.device) -> float:
    """Return a device's FLOP/s: a known card's datasheet rate for dense bf16, else a matrix product's measured rate."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = [card.flops for card_name, card in CARDS.items() if card_name in name]
    return known[0] if known else _measured_flops(device)


@lru_cache(maxsize=1)
def _measured_flops(device: torch.device) -> float:
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    generator = torch.Generator(device)  # a separate one: the run's random numbers must not depend on this measurement
    matrix = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ matrix).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def layer_layout(config: PreTrainedConfig, length: int, layer_idx: int) -> Layout:
    """Return the layout of layer `layer_idx` on rows of `length`."""
    return Layout(
        length=length,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        layer_idx=layer_idx,
    )


def visible_keys(pattern: MaskedAttention, config: PreTrainedConfig, length: int, layer_idx: int) -> float:
    """Return the number of keys that a query of a full row sees, averaged over queries and heads, within the model's
    own window.
    """
    layout = layer_layout(config, length, layer_idx)
    visible = pattern.visible(layout)
    groups = pattern.head_groups(layout, config.num_attention_heads)
    heads = torch.tensor([groups.index(group) for group in dict.fromkeys(groups)])[:, None, None]  # one per group
    alike = torch.tensor([groups.count(group) for group in dict.fromkeys(groups)]) / len(groups)
    window = own_window(config, layer_idx) or length
    batch, kv = torch.tensor(0), torch.arange(length, dtype=torch.int32)

    def count(query: int) -> float:
        q, keys = kv[query : query + 1, None], kv[max(0, query + 1 - window) : query + 1]
        seen = visible(batch, heads, q, keys).expand(len(heads), 1, len(keys)).sum(-1)[:, 0]
        return float(alike @ seen.float())

    queries = _sampled(length)
    return sum(map(count, queries)) / len(queries)


def _sampled(length: int) -> list[int]:
    """Return the indices of sampled queries: two in each stretch of the row, as far from its begin as from its end.

    The mean over such a pair is exact where counts grow linearly. The distance differs from stretch to stretch, so that
    groups as long as a stretch are not all sampled at the same place.
    """
    if length <= 16 * SAMPLED_QUERIES:  # short enough to count all queries
        return list(range(length))
    num_stretches = SAMPLED_QUERIES // 2
    edges = [length * i // num_stretches for i in range(num_stretches + 1)]
    queries = []
    for i, (begin, end) in enumerate(pairwise(edges)):
        inside = int((end - begin) * ((i + 0.5) * GOLDEN_RATIO % 1))
        queries += [begin + inside, end - 1 - inside]
    return queries


def own_window(config: PreTrainedConfig, layer_idx: int) -> int | None:
    """Return the sliding window that the model itself has in a layer, or None."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    return window if window and (types is None or types[layer_idx] == "sliding_attention") else None


def training_flops(model: nn.Module, method: Attention, length: int, teacher: bool = False) -> float:
    """Return the FLOPs that a token needs, forward and backward, on rows of `length`; recomputation is not counted.

    Attention over S keys takes 4·H·D·S forward and twice that backward. A `teacher` adds a forward in full attention.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    taught = attention_flops(config, FullAttention(), length) if teacher else 0.0
    return linear_flops(model, teacher) + 3 * attention_flops(config, method, length) + taught


def linear_flops(model: nn.Module, teacher: bool = False) -> float:
    """Return the FLOPs per token of all linear layers.

    A layer with P weights takes 2P forward, 2P for the gradient of its input, 2P for that of its weights if they train,
    and 2P for a `teacher`; with a teacher, hidden states are compared and the output head does not run.
    """
    linear = trained = 0
    head = model.get_output_embeddings() if teacher else None  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            linear += module.weight.numel()
            trained += module.weight.numel() * module.weight.requires_grad
    return (6 if teacher else 4) * linear + 2 * trained


def attention_flops(config: Any, method: Attention, length: int) -> float:
    """Return the forward FLOPs per token of all layers' attention scores and weighted sums."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    seen: dict[Any, float] = {}
    pairs = 0.0  # the number of keys that a query sees, summed over heads and layers
    for layer in range(config.num_hidden_layers):
        for pattern, num_heads in method.parts(layer_layout(config, length, layer)):
            if isinstance(pattern, Cost):
                pairs += num_heads * (pattern.keys + pattern.other_flops / (4 * head_dim))
                continue
            key = kind(pattern), pattern.layer_group(layer), own_window(config, layer)
            if key not in seen:
                seen[key] = visible_keys(pattern, config, length, layer)
            pairs += num_heads * seen[key]
    return float(4 * head_dim * pairs)
