"""What a policy can't do is refused in one line, by its name."""

from contextlib import nullcontext

import pytest
import torch

from lctrain.attention.full import FullAttention
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.cache.duo import DuoCache
from lctrain.cache.full import FullCache
from lctrain.cache.streaming import StreamingCache
from lctrain.errors import InputError
from lctrain.heads import HeadPattern
from lctrain.kernels.sdpa import SDPAKernel
from lctrain.model.install import install

STREAMING = StreamingCache(num_sink_tokens=3, recent_size=5, positions="text")


def duo(layers=2, heads=2, **fields):
    gates = [[0.0, 1.0][:heads] + [0.5] * (heads - 2)] * layers
    return DuoCache(pattern=HeadPattern.from_gates(gates, threshold=0.7, **fields), positions="text")


def installed(model):
    install(model, FullAttention())
    return model


def test_what_keeps_everything_anyway(tiny):
    model = installed(tiny("llama"))
    STREAMING.new(model, 9)
    duo(num_sink_tokens=3, recent_size=5).new(model, 9)
    with pytest.raises(InputError, match="= 8 is all of 8 tokens; use cache=full"):
        STREAMING.new(model, 8)
    with pytest.raises(InputError, match=r"keep 3 \+ 5 tokens, which is all of 8"):
        duo(num_sink_tokens=3, recent_size=5).new(model, 8)


def test_a_pattern_of_another_model(tiny):
    for pattern, reason in ((duo(layers=3), "3 layers of 2"), (duo(heads=4), "2 layers of 4")):
        with pytest.raises(InputError, match=f"the head pattern has {reason} .*, the model 2 of 2"):
            pattern.new(installed(tiny("llama")))


def refused(policy, reason):
    """Expects a refusal, but of a policy that keeps everything: it leaves what is seen to the model."""
    return nullcontext() if not policy.decides else pytest.raises(InputError, match=reason)


def test_models_with_windows_of_their_own(tiny, policy_of, policy):
    for model, kind in ((tiny("mistral", sliding_window=8), "mistral"), (tiny("gemma2"), "gemma2")):
        with refused(policy_of(policy), f"{kind} has layers of sliding_attention, and this cache .*; use cache=full"):
            policy_of(policy).new(installed(model))


def test_capped_scores(tiny, policy_of, policy):
    model = tiny("gemma2", layer_types=["full_attention"] * 2)
    with refused(policy_of(policy), "gemma2 caps attention scores"):
        policy_of(policy).new(installed(model))


def test_attention_that_knows_no_such_cache(tiny, policy_of, policy):
    with refused(policy_of(policy), "LlamaForCausalLM attends by 'sdpa'; lctrain"):
        policy_of(policy).new(tiny("llama", num_hidden_layers=4))


def test_another_method_than_the_caches_own(tiny, ids, policy_of, policy):
    model = tiny("llama", num_hidden_layers=4)
    install(model, SlidingWindowAttention(sliding_window=4))
    cache = policy_of(policy).new(model)
    with refused(policy_of(policy), r"decides itself what heads see, instead of SlidingWindow.*use attention=full"):
        model(ids(1, 12), past_key_values=cache)


def test_any_method_may_use_a_full_cache(tiny, ids):
    model, tokens = tiny("llama"), ids(1, 20)
    install(model, SlidingWindowAttention(sliding_window=4))
    cache = FullCache().new(model)
    with torch.no_grad():
        found = torch.cat([model(chunk, past_key_values=cache).logits for chunk in tokens.split(7, dim=1)], dim=1)
        torch.testing.assert_close(found, model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_a_full_cache_serves_attention_that_is_not_ours(tiny, ids):
    model, tokens = tiny("llama"), ids(2, 20)
    how = {"max_new_tokens": 6, "do_sample": False}
    found = model.generate(tokens, past_key_values=FullCache().new(model), **how)
    assert torch.equal(found, model.generate(tokens, **how))


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "qwen3"])
def test_a_full_cache_serves_models_with_windows(tiny, ids, model_type):
    model, tokens = installed(tiny(model_type)), ids(2, 40)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = model.generate(tokens, past_key_values=FullCache().new(model), **how)
    assert torch.equal(found, model.generate(tokens, use_cache=False, **how))


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type=dynamic has other frequencies in longer rows"),
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0,
             "original_max_position_embeddings": 32},
            "rope_type=longrope has other frequencies in longer rows",
        ),
    ],
)  # fmt: skip
def test_positions_in_the_cache_need_one_set_of_frequencies(tiny, rope, reason):
    model = installed(tiny("llama", rope_parameters=rope | {"rope_theta": 10000.0}))
    with pytest.raises(InputError, match=f"{reason}; use cache.positions=text"):
        StreamingCache(num_sink_tokens=3, recent_size=5, positions="cache").new(model)


def test_positions_in_the_cache_need_halves_that_rotate(tiny):
    model = installed(tiny("cohere"))
    STREAMING.new(model)
    with pytest.raises(InputError, match="CohereForCausalLM does not rotate halves of its heads"):
        StreamingCache(num_sink_tokens=3, recent_size=5, positions="cache").new(model)


def test_a_kernel_that_can_not_double_the_head(tiny, ids, monkeypatch):
    monkeypatch.setattr(SDPAKernel, "refusal", lambda *given: "is at its end" if given[-1].head_dim > 8 else None)
    model = installed(tiny("llama"))
    cache = StreamingCache(num_sink_tokens=3, recent_size=5, positions="cache").new(model)
    with pytest.raises(
        InputError, match="positions of the cache double the head dimension, and the kernel is at its end"
    ):
        model(ids(1, 12), past_key_values=cache)
