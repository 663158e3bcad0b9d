"""memory=auto: the cheapest that fits, along rungs on which memory only shrinks."""

from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate

from lctrain.config import compose
from lctrain.memory.savings import NOTHING, Savings
from lctrain.plan.memory import Memory
from lctrain.plan.run import plan, resolve
from lctrain.plan.savings import GROUPS, choose_savings, ladder

NUM_LAYERS = 8
UNIT = 100  # bytes of a layer's input; its attention's output weighs as much, all of it ten times that


def planned(savings: Savings) -> Memory:
    """By hand: what layers keep, one layer's recomputation."""
    kept = NUM_LAYERS - savings.checkpoint_layers
    num_inputs = -(-savings.checkpoint_layers // savings.checkpoint_every)
    on_device = num_inputs - savings.offload + savings.save_attention + (savings.checkpoint_every - 1)
    zero = dict.fromkeys(Memory.__dataclass_fields__, 0)
    activations = UNIT * (10 * kept + on_device + 2 * bool(savings.offload))
    return Memory(**zero | {"activations": activations, "host": UNIT * savings.offload})


def chosen(device: float, host: float = 1e9, dropout: bool = False) -> Savings:
    return choose_savings(NUM_LAYERS, 1024, planned, device=device, host=host, dropout=dropout)[0]


def test_nothing_is_saved_where_all_fits():
    assert chosen(device=80 * UNIT) == NOTHING


def test_as_few_layers_as_possible_are_recomputed_and_none_of_their_attention():
    savings = chosen(device=40 * UNIT)
    assert (savings.checkpoint_layers, savings.save_attention, savings.offload) == (5, 5, 0)
    assert planned(savings).peak <= 40 * UNIT < planned(replace(savings, checkpoint_layers=4, save_attention=4)).peak


def test_then_inputs_leave_the_device_then_attention_is_recomputed_then_inputs_are():
    offloaded = chosen(device=12 * UNIT)
    assert (offloaded.offload, offloaded.save_attention, offloaded.checkpoint_every) == (6, NUM_LAYERS, 1)
    recomputed = chosen(device=6 * UNIT)
    assert (recomputed.offload, recomputed.save_attention) == (NUM_LAYERS, 4)
    without_host = chosen(device=6 * UNIT, host=0)
    assert (without_host.offload, without_host.checkpoint_every) == (0, 2)


def test_the_host_is_not_filled_beyond_its_memory():
    assert planned(chosen(device=9 * UNIT, host=3 * UNIT)).host <= 3 * UNIT


def test_dropout_is_not_drawn_twice():
    assert chosen(device=6 * UNIT, host=0, dropout=True).checkpoint_every == 1


def test_along_a_rung_memory_only_shrinks_or_stays():
    recomputed = replace(NOTHING, checkpoint_layers=NUM_LAYERS, save_attention=NUM_LAYERS, mlp_tile=8192)
    for rung in ladder(recomputed, num_hosted=lambda: NUM_LAYERS, heads=[], groups=()):
        peaks = [planned(savings).peak for savings in rung[1:]]
        assert peaks == sorted(peaks, reverse=True)
    assert len(list(ladder(recomputed, num_hosted=lambda: 0, heads=[2, 1], groups=GROUPS))) == 4 + len(GROUPS)


@pytest.mark.parametrize("memory", ["none", "checkpoint", "auto"])
def test_a_real_shape_is_planned_with_each(memory, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    overrides = ["model=llama3_8b", "model.architecture={num_hidden_layers: 4}", "tuning=lora", "sequence_length=16384"]
    cfg = compose("plan", [*overrides, "rope=linear", f"memory={memory}", "kernel=flex", "device_memory=8"])
    result = plan(cfg)
    input_bytes = 16384 * 4096 * 2
    if memory == "none":
        assert result.memory.activations > 4 * 12 * input_bytes  # 100 KiB a token and layer, of which an input is 8
    if memory == "checkpoint":
        assert 4 * 2 * input_bytes < result.memory.activations < 4 * 3 * input_bytes
    if memory == "auto":
        assert result.memory.peak <= 8 * 2**30
        assert 0 < result.savings.checkpoint_layers < 4


@pytest.mark.parametrize(("device_memory", "what"), [(0.3, "6 keep attention"), (0.25, "3 keep attention")])
def test_nothing_waits_on_the_host_where_there_is_no_card(device_memory, what):
    """trainer.accelerator=auto, the default, says nothing of the machine."""
    words = ["experiment=demo", "memory=auto", f"memory.device_memory={device_memory}", "trainer.accelerator=auto"]
    cfg = compose("train", words)
    recipe = instantiate(cfg.model, _convert_="all")
    resolved = resolve(cfg, recipe, [cfg.sequence_length], torch.device("cpu"), num_devices=1)
    resolved.check([cfg.sequence_length], "cpu")
    assert what in str(resolved.memory)
