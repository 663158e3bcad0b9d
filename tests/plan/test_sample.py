"""A few layers stand for all: what is planned from a sample is, to the byte, what a simulation of every layer finds."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from lctrain.config import compose
from lctrain.memory.savings import NOTHING, Savings
from lctrain.plan import sample as sampling
from lctrain.plan.memory import Memory
from lctrain.plan.run import _memory_of, _step, instantiate

NUM_LAYERS = 12
ALL = replace(NOTHING, checkpoint_layers="all")
SAVINGS = {
    "half of the layers": replace(NOTHING, checkpoint_layers=7, save_attention=7),
    "all": replace(ALL, mlp_tile=256),
    "attention of some": replace(ALL, save_attention=5, mlp_tile=256),
    "all inputs on the host": replace(ALL, offload="all"),
    "host before attention": replace(ALL, offload=4, save_attention=5),
    "host after attention": replace(ALL, offload=10, save_attention=9),
    "every third input": replace(ALL, checkpoint_every=3),
    "every third input, two on the host": replace(ALL, checkpoint_every=3, offload=2),
    "every second input, of some": replace(NOTHING, checkpoint_layers=10, checkpoint_every=2, offload=4),
    "heads": replace(ALL, kv_heads_at_a_time=1, save_attention=6, offload=8),
}
OTHERS = ("longlora", "full")
MODEL = (
    "{model_type: llama, vocab_size: 320, hidden_size: 64, intermediate_size: 160, num_attention_heads: 4, "
    f"num_key_value_heads: 2, num_hidden_layers: {NUM_LAYERS}, max_position_embeddings: 512}}"
)


def planned(savings: Savings, *overrides: str) -> Memory:
    words = ["model.path=nobody/nothing", f"model.architecture={MODEL}", "sequence_length=512", "kernel=flex"]
    cfg = compose("plan", [*words, *overrides])
    recipe: Any = replace(instantiate(cfg.model, _convert_="all"), memory=savings)
    return _memory_of(cfg, recipe, _step(cfg, recipe, 512, "cuda", num_devices=1), "cuda", device=0, host=0)[1]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(("name", "tuning"), [*((name, "lora") for name in SAVINGS), *product(("heads",), OTHERS)])
def test_a_sample_is_the_whole(monkeypatch, name, tuning):
    overrides = [f"tuning={tuning}", "model.dtype=bfloat16", "attention=shifted_sparse"]
    few = planned(SAVINGS[name], *overrides)
    monkeypatch.setattr(sampling, "NUM_UNITS", NUM_LAYERS)
    assert few == planned(SAVINGS[name], *overrides)


def llama(num_layers, trained=""):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=num_layers))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not trained or trained in name)
    return model


def test_samples_are_small_and_shared():
    layers, kinds = llama(32).model.layers, 32 * ["full"]
    a, b = (sampling.sample(layers, kinds, replace(NOTHING, checkpoint_layers=n, save_attention=n)) for n in (28, 9))
    assert (a.num_layers, a.num_left_out, a.savings) == (6, 26, b.savings)
    assert b.num_left_out == 26


def test_layers_that_differ_are_all_simulated():
    trained = sampling.sample(llama(8, trained="layers.5").model.layers, 8 * ["full"], ALL)
    patterns = sampling.sample(llama(8).model.layers, 7 * ["full"] + ["streaming"], ALL)
    assert (trained.num_layers, patterns.num_layers) == (8, 8)
