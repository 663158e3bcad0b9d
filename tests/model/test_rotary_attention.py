"""Some heads at a time: the loss and every gradient of all heads together, in fp64."""

from dataclasses import replace

import pytest
import torch

from lctrain.attention.duo import DuoAttention
from lctrain.attention.full import FullAttention
from lctrain.attention.shifted_sparse import ShiftedSparseAttention
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.attention.streaming import StreamingAttention
from lctrain.errors import InputError
from lctrain.kernels.sdpa import SDPAKernel
from lctrain.memory.host import PinnedHost
from lctrain.memory.savings import NOTHING
from lctrain.model.install import install
from lctrain.model.layers import part_heads
from lctrain.model.tuning import FullTuning, LoRATuning, ModuleTuning
from lctrain.plan.simulation import Storages

NUM_LAYERS, LENGTH = 3, 48
METHODS = {
    "full": FullAttention(),
    "sliding_window": SlidingWindowAttention(sliding_window=9),
    "streaming": StreamingAttention(num_sink_tokens=2, recent_size=5),
    "shifted_sparse": ShiftedSparseAttention(group_size_ratio=0.25),
    "duo": DuoAttention(num_sink_tokens=2, recent_size=5, initial_gate=0.3, clamp=True),
}
TUNINGS = {
    "full": FullTuning(),
    "lora": LoRATuning(
        r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], trainable=[]
    ),
    "longlora": LoRATuning(
        r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj", "o_proj"], trainable=["norm"]
    ),
    "one matrix": ModuleTuning(trainable=["layers.1.self_attn.v_proj"]),
}
ALL = replace(NOTHING, checkpoint_layers=NUM_LAYERS)
SAVINGS = {
    "recomputed": ALL,
    "attention kept": replace(ALL, save_attention=NUM_LAYERS),
    "one attention kept": replace(ALL, save_attention=1, mlp_tile=16),
    "every second input": replace(ALL, checkpoint_every=2),
}


@pytest.fixture
def attentions(monkeypatch):
    """How many query heads each run of the kernel computed."""
    runs = []
    attend = SDPAKernel.attend

    def counted(self, q, *args, **kwargs):
        runs.append(q.shape[1])
        return attend(self, q, *args, **kwargs)

    monkeypatch.setattr(SDPAKernel, "attend", counted)
    return runs


@pytest.fixture
def step(tiny, ids):
    """The model behind a forward and backward on a packed and a whole row."""

    def run(method, tuning, savings, heads, family="llama", **shape):
        model = tiny(family, num_hidden_layers=NUM_LAYERS, num_attention_heads=8, num_key_value_heads=4, **shape)
        install(model.double(), method, "sdpa")
        tuned = tuning.apply(model).train()
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
        base = tuned.get_base_model() if hasattr(tuned, "peft_config") else tuned
        if heads:
            part_heads(base, NUM_LAYERS, heads)
        savings.apply(base, PinnedHost())
        positions = torch.stack([torch.cat([torch.arange(31), torch.arange(17)]), torch.arange(LENGTH)])
        tokens = ids(2, LENGTH)
        hidden = base.model(
            input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens), use_cache=False
        ).last_hidden_state
        loss = (hidden * torch.arange(hidden.shape[-1])).square().mean()
        loss.backward()
        return loss.item(), {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}

    return run


def check(step, method, tuning, savings, heads, **shape):
    loss, gradients = step(method, tuning, NOTHING, 0, **shape)
    parted, others = step(method, tuning, savings, heads, **shape)
    assert parted == pytest.approx(loss, rel=1e-12)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("heads", [1, 2])
def test_every_pattern(step, method, heads):
    check(step, METHODS[method], TUNINGS["lora"], SAVINGS["recomputed"], heads)


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("savings", SAVINGS)
def test_every_tuning_and_saving(step, tuning, savings):
    check(step, METHODS["shifted_sparse"], TUNINGS[tuning], SAVINGS[savings], 1)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_biases_are_added_once(step, family):
    shape = {"attention_bias": True} if family == "llama" else {}
    check(step, METHODS["full"], TUNINGS["full"], SAVINGS["recomputed"], 2, family=family, **shape)


@pytest.mark.parametrize(
    ("savings", "runs"), [("recomputed", 2), ("attention kept", 1), ("every second input", 2 + 1 / 3)]
)
def test_no_attention_runs_once_more_than_without_parts(step, attentions, savings, runs):
    step(METHODS["full"], TUNINGS["lora"], SAVINGS[savings], 1)
    assert set(attentions) == {2}
    assert len(attentions) == pytest.approx(4 * NUM_LAYERS * runs)


def test_heads_that_see_the_same_share_a_mask(step, monkeypatch):
    prepared = []
    prepare = SDPAKernel.prepare
    monkeypatch.setattr(SDPAKernel, "prepare", lambda self, mask: prepared.append(mask) or prepare(self, mask))
    step(METHODS["shifted_sparse"], TUNINGS["lora"], SAVINGS["recomputed"], 1)
    assert [mask.num_heads for mask in prepared] == [1, 1]  # unshifted, shifted; for all layers


def test_what_stands_together_is_less(step):
    def peak(heads):
        with Storages() as storages:
            step(METHODS["full"], TUNINGS["lora"], SAVINGS["attention kept"], heads, head_dim=64)
        return storages.peak

    assert peak(1) < 0.8 * peak(0)


def test_attention_that_does_more_than_rotate_is_refused(tiny):
    with pytest.raises(InputError, match=r"memory.kv_heads_at_a_time: Qwen3ForCausalLM's attention can't be parted"):
        part_heads(tiny("qwen3"), 1, 1)
