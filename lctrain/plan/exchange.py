"""Estimate how long devices wait for each other in a step: bytes sent over the rates of the links between them."""

from dataclasses import dataclass
from typing import Any

from lctrain.memory.savings import Savings
from lctrain.parallel.mesh import Mesh
from lctrain.parallel.ulysses import num_repeats
from lctrain.plan.cards import Card
from lctrain.plan.sharding import Sharding

# Measured share of a link's datasheet rate when heads are exchanged, waits included (docs/results/parallel.md).
LINK = 0.37
NETWORK = 50e9 * LINK  # between nodes, one way: a 400 Gbit/s adapter for each device
HALF = 2  # bytes of each number in a query, key or value


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Bytes that a device sends: `heads` per token, for which attention waits; `weights` per micro-batch and
    `gradients` per step, both while the device computes.
    """

    heads: float
    weights: float
    gradients: float
    mesh: Mesh
    num_devices_per_node: int

    @classmethod
    def of(
        cls, config: Any, mesh: Mesh, num_devices_per_node: int, sharding: Sharding, savings: Savings,
        *, weights: int, trained: int, teacher: bool,
    ) -> "Exchange":  # fmt: skip
        """Count the bytes for a model with this text `config`, with `weights` and `trained` weights in bytes."""
        counts = savings.resolve(config.num_hidden_layers)
        again = int(counts.checkpoint_layers) * (2 - 1 / counts.checkpoint_every)  # layers whose forward runs again
        passes = (2 + teacher) * config.num_hidden_layers + again
        others = (mesh.world_size - 1) / mesh.world_size
        zero3 = sharding.stage == 3
        return cls(
            heads=passes * head_bytes(config, mesh.sequence_parallel_size),
            weights=(2 * weights + trained) * others if zero3 else 0.0,
            gradients=0.0 if zero3 else 2 * trained * others,
            mesh=mesh,
            num_devices_per_node=num_devices_per_node,
        )

    def seconds(self, card: Card, tokens: int, num_micro_batches: int, computing: float) -> float:
        """Return how many seconds a device with this many `tokens` per step waits.

        Weights and gradients, sent during the computation, add only the time beyond its `computing` seconds.
        """
        sp = self.mesh.sequence_parallel_size
        near = self.mesh.world_size <= self.num_devices_per_node
        rate = card.link * LINK if near else NETWORK
        heads_rate = card.link * LINK if self.num_devices_per_node % sp == 0 else NETWORK
        beside = (self.weights * num_micro_batches + self.gradients) / rate
        return tokens * self.heads / heads_rate + max(0.0, beside - computing)


def head_bytes(config: Any, size: int) -> float:
    """Return the bytes that a device sends per token in a layer's forward, and again in its backward: queries, keys,
    values and outputs, except for the device's own share.
    """
    if size == 1:
        return 0.0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * num_repeats(config.num_key_value_heads, size)
    return float(2 * (config.num_attention_heads + keys) * head_dim * HALF * (size - 1) / size)
