import weakref
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MptConfig,
    MptForCausalLM,
)
from transformers.masking_utils import AttentionMaskInterface

from lctrain.attention.base import Attention, MaskedAttention
from lctrain.attention.full import FullAttention
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.errors import InputError
from lctrain.kernels.sdpa import SDPAKernel
from lctrain.model.install import attention_modules, full_attention, install

WINDOW = SlidingWindowAttention(sliding_window=4)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (
            BloomForCausalLM,
            BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=1),
        ),
        (MptForCausalLM, MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4)),
        (FalconForCausalLM, FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)),
    ],
)
def test_a_model_without_the_interface_is_refused_by_name(model_class, config):
    with pytest.raises(
        InputError, match=f"{model_class.__name__} does not use transformers' attention interface; Sliding"
    ):
        install(model_class(config), WINDOW)


def test_a_softmax_with_more_in_it_is_refused(tiny, ids):
    """gpt-oss learns one sink per head; dropped, the logits would quietly be wrong."""
    model = tiny("gpt_oss", num_local_experts=2, num_experts_per_tok=1)
    install(model, FullAttention())
    with pytest.raises(InputError, match="GptOssAttention has s_aux in its softmax"):
        model(input_ids=ids(1, 8))


def test_a_model_that_tells_no_positions_is_refused(tiny, ids):
    model = tiny("gpt_bigcode", n_embd=32, n_layer=1, n_head=4, attn_pdrop=0.0)
    install(model, WINDOW)
    with pytest.raises(InputError, match="hands no position_ids to its attention"):
        model(input_ids=ids(1, 8))


def test_attention_dropout_is_refused(tiny, ids):
    model = tiny("llama", attention_dropout=0.1).train()
    install(model, WINDOW)
    with pytest.raises(InputError, match="no dropout; set attention_dropout to 0"):
        model(input_ids=ids(1, 8))


def test_a_kernel_that_cannot_run_is_refused(tiny):
    with pytest.raises(InputError, match="kernel=sdpa can't cap attention scores"):
        install(tiny("gemma2"), FullAttention(), "sdpa")
    with pytest.raises(InputError, match="no kernel 'fast'"):
        install(tiny("llama"), FullAttention(), "fast")


def test_models_with_different_methods_live_side_by_side(tiny, ids):
    tokens = ids(1, 20)
    plain, full, window = tiny("llama"), tiny("llama"), tiny("llama")
    install(full, FullAttention())
    install(window, WINDOW)
    logits = [model(input_ids=tokens).logits for model in (plain, full, window)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert (logits[2] - logits[0]).abs().max() > 1e-2
    install(window, FullAttention())
    assert torch.equal(window(input_ids=tokens).logits, logits[1])


def test_full_attention_for_a_while(tiny, ids):
    """The teacher of a model that attends otherwise: the same weights, the same kernel, and back again."""
    tokens, model, full = ids(1, 20), tiny("llama"), tiny("llama")
    install(model, WINDOW)
    install(full, FullAttention())
    before = model(input_ids=tokens).logits
    with full_attention(model):
        assert torch.equal(model(input_ids=tokens).logits, full(input_ids=tokens).logits)
    assert torch.equal(model(input_ids=tokens).logits, before)
    with pytest.raises(RuntimeError, match="on purpose"), full_attention(model):
        raise RuntimeError("on purpose")
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_attention_modules_are_found_in_every_family(tiny):
    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"):
        assert [module.layer_idx for module in attention_modules(tiny(family))] == [0, 1]
    model = tiny("llama")
    del model.model.layers[0].self_attn.num_key_value_groups
    with pytest.raises(InputError, match="1 of its modules attend with key-value heads"):
        attention_modules(model)


def test_the_implementations_name_stays_out_of_the_saved_config(tiny, tmp_path):
    model = tiny("llama")
    install(model, WINDOW)
    model.save_pretrained(tmp_path)
    assert "lctrain" not in (tmp_path / "config.json").read_text()


def test_a_mask_is_prepared_once_for_all_layers_of_a_forward(tiny, ids, monkeypatch):
    prepare, calls = SDPAKernel.prepare, []
    monkeypatch.setattr(SDPAKernel, "prepare", lambda self, *args: (calls.append(1), prepare(self, *args))[1])
    for widths, expected in ((4, 1), ([4, 8, 4, 8], 2)):
        calls.clear()
        model = tiny("llama", num_hidden_layers=4)
        install(model, SlidingWindowAttention(sliding_window=widths))
        model(input_ids=ids(1, 20))
        assert len(calls) == expected


class Chosen(MaskedAttention):
    """A token sees itself, and before it the keys of `seen_S`."""

    def visible(self, layout):
        return lambda b, h, q_pos, kv_pos: self.seen_S[kv_pos] | (q_pos == kv_pos)


@dataclass(frozen=True)
class Hidden(Chosen):
    seen_S: Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class ByIdentity(Chosen):
    seen_S: Tensor = field(repr=False)


class Changing(Chosen):
    """One object whose tensor is another in each layer."""

    def __repr__(self):
        return "Changing()"


changing = Changing()


def changed(seen_S):
    changing.seen_S = seen_S
    return changing


@dataclass(frozen=True)
class Listed(Chosen):
    """A value: what is seen is in its fields."""

    seen: tuple[bool, ...] = field(repr=False)

    @property
    def seen_S(self):
        return torch.tensor(self.seen)


def largest_S(k_BKSD):
    """Half of the keys, in each layer others."""
    norms_S = k_BKSD.detach().norm(dim=-1).mean((0, 1))
    return norms_S > norms_S.median()


class Choosing(Attention):
    """Sees the keys that are larger than half of them: a pattern that depends on k."""

    def __init__(self, pattern):
        self.pattern = pattern

    def attend(self, module, q, k, v, call):
        return call.run(self.pattern(largest_S(k)), q, k, v)

    def parts(self, layout):
        raise NotImplementedError


def naive_choosing(module, q, k, v, mask, scaling, **_):
    length = k.shape[2]
    sees = torch.ones(length, length).tril().bool() & (largest_S(k) | torch.eye(length).bool())
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT * scaling).masked_fill(~sees, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2), None


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize(
    "pattern",
    [Hidden, ByIdentity, changed, lambda seen_S: Listed(tuple(seen_S.tolist()))],
    ids=["hidden", "identity", "changing", "listed"],
)
def test_a_pattern_made_of_keys_is_each_layers_own(tiny, ids, pattern, kernel):
    model, expected, tokens = tiny("llama", num_hidden_layers=4), tiny("llama", num_hidden_layers=4), ids(2, 20)
    install(model, Choosing(pattern), kernel)
    AttentionInterface.register("choosing", naive_choosing)
    AttentionMaskInterface.register("choosing", lambda **_: None)
    expected.set_attn_implementation("choosing")
    with torch.no_grad():
        found, expected = (m(input_ids=tokens, use_cache=False).logits for m in (model, expected))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class Kept(list):
    """What a kernel prepared, which a weak reference may point to."""


def test_what_is_no_value_is_prepared_anew_and_not_kept(tiny, ids, monkeypatch):
    prepare, made, alive = SDPAKernel.prepare, [], []

    def watched(self, mask):
        alive.append(sum(reference() is not None for reference in made))
        prepared = Kept(prepare(self, mask))
        made.append(weakref.ref(prepared))
        return prepared

    monkeypatch.setattr(SDPAKernel, "prepare", watched)
    model = tiny("llama", num_hidden_layers=4)
    for pattern, expected in ((Hidden, [0, 0, 0, 0]), (lambda seen_S: Listed((True, False) * 10), [0])):
        alive.clear()
        install(model, Choosing(pattern), "sdpa")
        with torch.no_grad():
            model(input_ids=ids(1, 20))
        assert alive == expected
