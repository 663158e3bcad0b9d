"""Bytes between devices, counted by hand, and what of their time a step waits for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from lctrain.config import compose
from lctrain.errors import InputError
from lctrain.memory.savings import NOTHING
from lctrain.parallel.mesh import Mesh
from lctrain.plan.cards import card
from lctrain.plan.exchange import LINK, NETWORK, Exchange, head_bytes
from lctrain.plan.run import main, plan
from lctrain.plan.sharding import Sharding

LLAMA = SimpleNamespace(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
H100 = card("H100")


def exchange(world_size=8, shared=1, per_node=8, stage=0, teacher=False, **savings):
    return Exchange.of(
        LLAMA,
        Mesh(rank=0, world_size=world_size, sequence_parallel_size=shared),
        per_node,
        Sharding(stage=stage, num_devices=world_size, offload_optimizer=False, offload_parameters=False, bucket_size=1),
        replace(NOTHING, **savings),
        weights=16 * 10**9,
        trained=4 * 10**9,
        teacher=teacher,
    )


def test_heads_are_counted_by_hand():
    """Of a token 32 queries, 8 keys, 8 values go out and 32 outputs come back, of 128 numbers of 2 bytes each."""
    assert head_bytes(LLAMA, 1) == 0
    assert head_bytes(LLAMA, 2) == (32 + 8 + 8 + 32) * 128 * 2 / 2
    assert head_bytes(LLAMA, 8) == (32 + 8 + 8 + 32) * 128 * 2 * 7 / 8
    assert head_bytes(LLAMA, 16) == (32 + 16 + 16 + 32) * 128 * 2 * 15 / 16  # each key-value head is sent twice


def test_a_forward_that_runs_again_exchanges_again():
    once = exchange(shared=2).heads
    assert once == 2 * 32 * head_bytes(LLAMA, 2)
    assert exchange(shared=2, checkpoint_layers=32).heads == 1.5 * once
    assert exchange(shared=2, teacher=True).heads == 1.5 * once


def test_each_stage_sends_what_it_does_not_hold():
    assert exchange(stage=0).gradients == exchange(stage=2).gradients == 2 * 4e9 * 7 / 8
    assert exchange(stage=3).weights == (2 * 16e9 + 4e9) * 7 / 8
    assert exchange(world_size=1).gradients == 0


def test_heads_wait_and_weights_run_beside_the_computation():
    heads, weights = exchange(shared=2), exchange(stage=3)
    assert heads.seconds(H100, 1000, 1, 1e9) == pytest.approx(1000 * heads.heads / (450e9 * LINK))
    takes = weights.weights / (450e9 * LINK)
    assert weights.seconds(H100, 1000, 1, takes + 1) == 0
    assert weights.seconds(H100, 1000, 3, takes) == pytest.approx(2 * takes)


def test_between_nodes_the_network_decides():
    inside, across = exchange(world_size=16, shared=8), exchange(world_size=16, shared=16)
    assert inside.seconds(H100, 10**6, 1, 1e9) == pytest.approx(1e6 * inside.heads / (450e9 * LINK))
    assert across.seconds(H100, 10**6, 1, 1e9) == pytest.approx(1e6 * across.heads / NETWORK)


SHAPE = [
    "model=llama3_8b",
    "tuning=lora",
    "kernel=flex",
    "sequence_length=131072",
    "rope=none",
    "rope.extrapolate=true",
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_plan_tells_hours_and_what_repeated_heads_cost(capsys):
    overrides = [*SHAPE, "num_devices=8", "trainer.num_nodes=2", "sequence_parallel_size=16", "trainer.max_steps=100"]
    planned = plan(compose("plan", overrides))
    (stage,) = planned.stages
    assert 0 < stage.waiting < stage.seconds
    assert planned.hours == pytest.approx(100 * stage.seconds / 3600)
    main(compose("plan", overrides))
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "16 to a row (each key-value head on 2, 1.20 times the exchange)" in printed
    assert f"{planned.hours * 16:.3g} of all devices" in printed


def test_a_row_that_more_devices_share_than_there_are_heads_is_refused():
    with pytest.raises(InputError, match="1, 2, 4, 8, 16, 32 can, and further devices read other rows"):
        plan(compose("plan", [*SHAPE, "num_devices=64", "sequence_parallel_size=64"]))
