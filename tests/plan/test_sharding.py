"""What a plan says of sharded runs is what ZeRO's paper counts, and what the config asks for."""

from dataclasses import replace

import pytest

from lctrain import config
from lctrain.plan.memory import Memory
from lctrain.plan.run import plan
from lctrain.plan.sharding import Sharding

# 1000 parameters in fp32 that all train with Adam: 4 bytes each, 4 of gradient, 8 of moments.
WHOLE = Memory(
    weights=4000, gradients=4000, optimizer=8000, buckets=0,
    activations=100, attention=10, loss=20, backward=30, update=4000, host=5,
)  # fmt: skip
NONE = Sharding(stage=0, num_devices=4, offload_optimizer=False, offload_parameters=False, bucket_size=100)


def test_each_stage_shards_what_the_one_before_left_whole():
    stages = [replace(NONE, stage=stage).apply(WHOLE, 1000, 10) for stage in range(4)]
    assert stages[0] == WHOLE
    copy = 4000 // 4  # in fp32, which all stages update
    assert [memory.optimizer for memory in stages[1:]] == [8000 // 4 + copy] * 3
    assert [memory.gradients for memory in stages] == [4000, 4000, 1000, 1000]
    assert [memory.weights for memory in stages] == [4000, 4000, 4000, 1000 + 4000]  # a small model is gathered whole
    assert [memory.buckets for memory in stages] == [0, 800, 800, 480]
    assert [memory.update for memory in stages] == [4000, 2000, 2000, 2000]  # a copy of gradients, and temporaries
    assert {(memory.activations, memory.host) for memory in stages} == {(100, 5)}


def test_a_large_model_is_gathered_in_parts():
    billions = replace(WHOLE, weights=40 * 10**9)
    sharded = replace(NONE, stage=3).apply(billions, 10**10, 10)
    assert sharded.weights == 10 * 10**9 + 2 * 10**9  # a quarter, and half a billion parameters of 4 bytes


def test_stage_3_reads_half_precision_beside_the_copy_that_it_updates():
    half = replace(NONE, stage=3, half_precision=True).apply(WHOLE, 1000, 10)
    whole = replace(NONE, stage=3).apply(WHOLE, 1000, 10)
    assert (half.weights, half.gradients, half.optimizer) == (whole.weights // 2, whole.gradients // 2, whole.optimizer)


def test_what_is_offloaded_waits_on_the_host():
    asked = replace(NONE, stage=3, offload_optimizer=True, offload_parameters=True)
    memory = asked.apply(WHOLE, 1000, 10)
    assert (memory.optimizer, memory.gradients, memory.update, memory.weights) == (0, 0, 0, 4000)
    assert memory.host == 5 + 3000 + 2000 + 1000  # states and the fp32 copy, gradients twice, the shard


@pytest.fixture(scope="module")
def planned():
    """The plan of a run of the tiny base under overrides."""
    shape = ["rope=linear", "trainer.accelerator=cpu", "num_devices=4", "trainer.max_steps=2", "sequence_length=1024"]
    return lambda *overrides: plan(config.compose("plan", [*shape, *overrides]))


def test_sequence_parallelism_divides_what_grows_with_the_row(planned):
    one, two = planned(), planned("sequence_parallel_size=2", "datamodule.micro_batch_size=2")
    assert one.tokens_per_step == two.tokens_per_step == 4096
    kept = 1024 * 256 * 2 * 6  # beside two halves instead of one row: each layer's output before its exchange
    assert two.memory.activations - one.memory.activations == pytest.approx(kept, rel=0.1)
    alone = planned("sequence_parallel_size=2")
    assert 0.5 <= alone.memory.activations / one.memory.activations < 0.6


def test_the_config_is_read(planned):
    whole, sharded = planned(), planned("strategy=zero2")
    assert sharded.sharding == Sharding(
        stage=2, num_devices=4, offload_optimizer=False, offload_parameters=False, bucket_size=200_000_000
    )
    assert sharded.memory.gradients == whole.memory.gradients // 4
    assert planned("strategy=zero1", "strategy.offload_optimizer=true").memory.optimizer == 0
