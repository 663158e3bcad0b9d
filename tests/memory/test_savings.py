"""Every saving gives the loss and gradients of a step without it, and does what it says."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from lctrain.errors import InputError
from lctrain.memory.host import PinnedHost
from lctrain.memory.savings import NOTHING, Savings

NUM_LAYERS = 5  # of the fixture

ALL = replace(NOTHING, checkpoint_layers="all")
CASES = {
    "checkpoint": ALL,
    "the first three layers": replace(NOTHING, checkpoint_layers=3),
    "attention": replace(ALL, save_attention="all"),
    "the last two attentions": replace(ALL, save_attention=2),
    "every second": replace(ALL, checkpoint_every=2),
    "every third": replace(ALL, checkpoint_every=3),
    "offload": replace(ALL, offload="all"),
    "offload two": replace(ALL, offload=2),
    "tiles": replace(ALL, mlp_tile=16),
    "tiles that do not divide the row": replace(ALL, mlp_tile=7),
    "one tile": replace(ALL, mlp_tile=40),
    "all together": Savings(
        checkpoint_layers=4, checkpoint_every=2, save_attention=3, offload=1, mlp_tile=16, kv_heads_at_a_time=0
    ),
}


def frozen_but_one(model):
    """As LoRA does: the first layers' inputs need no gradient."""
    model.requires_grad_(False)
    model.model.layers[1].self_attn.v_proj.requires_grad_(True)


@pytest.mark.parametrize("prepare", [lambda model: None, frozen_but_one], ids=["all train", "one matrix trains"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_without(step, name, prepare):
    plain, saved = step(prepare=prepare), step(CASES[name], prepare=prepare)
    assert torch.equal(saved.loss, plain.loss)
    assert saved.gradients.keys() == plain.gradients.keys()
    for parameter, gradient in plain.gradients.items():  # tiles add up a weight's gradient in another order
        torch.testing.assert_close(saved.gradients[parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)


@pytest.mark.parametrize(
    ("name", "num_attentions"),
    [
        ("checkpoint", 2 * NUM_LAYERS),
        ("the first three layers", NUM_LAYERS + 3),
        ("attention", NUM_LAYERS),
        ("the last two attentions", 2 * NUM_LAYERS - 2),
        ("every second", 2 * NUM_LAYERS + 2),  # two of five inputs are computed again
        ("every third", 2 * NUM_LAYERS + 3),
    ],
)
def test_attention_runs_as_often_as_it_must(step, name, num_attentions):
    assert step(CASES[name]).num_attentions == num_attentions


def test_inputs_go_to_the_host(step):
    assert step(CASES["checkpoint"]).num_hosted == 0
    assert step(CASES["offload"]).num_hosted == NUM_LAYERS
    assert step(CASES["offload two"]).num_hosted == 2
    assert step(CASES["all together"]).num_hosted == 1


def test_tiles_cost_no_computation(step):
    whole, tiled = step(CASES["checkpoint"]).num_mlp_tokens, step(CASES["tiles"]).num_mlp_tokens
    assert max(tiled) == 16
    assert max(whole) == 40
    assert sum(tiled) == sum(whole) == 2 * NUM_LAYERS * 40


def test_parameters_keep_their_names(tiny):
    model = tiny("llama")
    names = list(dict(model.named_parameters()))
    replace(ALL, mlp_tile=8).apply(model, PinnedHost())
    assert sorted(dict(model.named_parameters())) == sorted(names)


def test_evaluation_is_not_touched(tiny, ids):
    model = tiny("llama").eval()
    expected = model(ids(1, 20)).logits
    CASES["all together"].apply(model, PinnedHost())
    assert torch.equal(model.eval()(ids(1, 20)).logits, expected)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(ids(1, 20)).logits, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_layers": -1}, "memory.checkpoint_layers=-1"),
        ({"save_attention": "all"}, "nothing to save"),
        ({"mlp_tile": 8}, "nothing to save"),
        ({"checkpoint_layers": "all", "checkpoint_every": 0}, "memory.checkpoint_every=0"),
        ({"checkpoint_layers": 2, "checkpoint_every": 3}, "more than the 2 layers"),
        ({"checkpoint_layers": "all", "offload": 1}, "needs a CUDA device"),
        ({"checkpoint_layers": "all", "checkpoint_every": 2}, "dropout"),
    ],
)
def test_refusals(changes, message):
    config = LlamaConfig(num_hidden_layers=NUM_LAYERS)
    with pytest.raises(InputError, match=message):
        replace(NOTHING, **changes).check(config, device_type="cpu", dropout=True)
