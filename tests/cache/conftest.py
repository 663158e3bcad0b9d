"""Policies over a tiny Llama, and what they should compute: attention by the pattern, written from the papers."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.llama.modeling_llama import rotate_half

from lctrain.attention.full import FullAttention
from lctrain.cache.duo import DuoCache
from lctrain.cache.full import FullCache
from lctrain.cache.streaming import StreamingCache
from lctrain.heads import HeadPattern
from lctrain.model.install import install

SINKS, RECENT = 3, 5
# Layers of both kinds of heads, of retrieval heads alone and of streaming heads alone; as many heads as are needed.
RETRIEVES = [[True, False, False, True], [True] * 4, [False] * 4, [False, True, True, True]]


def head_pattern(num_layers=4, num_kv_heads=4):
    gates = torch.tensor(RETRIEVES)[:num_layers, :num_kv_heads].double()
    return HeadPattern.from_gates(gates, threshold=0.5, num_sink_tokens=SINKS, recent_size=RECENT)


POLICIES = {
    "full": lambda kv, positions: FullCache(),
    "streaming": lambda kv, positions: StreamingCache(num_sink_tokens=SINKS, recent_size=RECENT, positions=positions),
    "duo": lambda kv, positions: DuoCache(pattern=head_pattern(num_kv_heads=kv), positions=positions),
}


def streams(policy, layer, kv_head):
    return {"full": False, "streaming": True, "duo": not RETRIEVES[layer][kv_head]}[policy]


def naive_attention(policy, positions, inv_freq):
    """Row by row, head by head, token by token; keys are turned back and placed where the paper has them."""

    def turn(x, by):
        angles = by.double()[:, None] * inv_freq.double()
        cos, sin = (torch.cat((f(angles),) * 2, -1) for f in (torch.cos, torch.sin))
        return x * cos + rotate_half(x) * sin

    def attend(module, q, k, v, mask, scaling, **_):
        out = torch.zeros_like(q)
        for b in range(q.shape[0]):
            real = torch.arange(q.shape[2]) if mask is None else mask[b].nonzero()[:, 0]
            for h in range(q.shape[1]):
                kv_head = h // (q.shape[1] // k.shape[1])
                for p, i in enumerate(real):
                    seen = torch.arange(p + 1)
                    if streams(policy, module.layer_idx, kv_head):
                        seen = torch.cat((seen[:SINKS], seen[SINKS:][-RECENT:])) if p >= SINKS else seen
                        seen = seen[(seen < SINKS) | (p - seen < RECENT)]
                    keys, query, values = k[b, kv_head, real[seen]], q[b, h, i][None], v[b, kv_head, real[seen]]
                    if positions == "cache" and streams(policy, module.layer_idx, kv_head):
                        place = torch.arange(len(seen))
                        keys, query = turn(keys, place - seen), turn(query, place[-1:] - p)
                    out[b, h, i] = ((query @ keys.T * scaling).softmax(-1) @ values)[0]
        return out.transpose(1, 2), None

    return attend


@pytest.fixture
def serving(tiny):
    """A tiny Llama in fp64, and a policy for it."""

    def make(policy, *, kv=2, positions="text", kernel="sdpa", **changes):
        model = tiny("llama", num_hidden_layers=4, num_key_value_heads=kv, **changes).double()
        install(model, FullAttention(), kernel)
        return model, POLICIES[policy](kv, positions)

    return make


@pytest.fixture
def naive(tiny):
    """The same Llama, which attends by the pattern and knows no cache."""

    def make(policy, *, kv=2, positions="text", **changes):
        model = tiny("llama", num_hidden_layers=4, num_key_value_heads=kv, **changes).double()
        name = f"naive_{policy}_{positions}"
        AttentionInterface.register(name, naive_attention(policy, positions, model.model.rotary_emb.inv_freq))
        AttentionMaskInterface.register(name, lambda attention_mask=None, **_: attention_mask)
        model.set_attn_implementation(name)
        return model

    return make
