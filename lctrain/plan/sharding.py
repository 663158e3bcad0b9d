"""Divide the parts of a step's memory that ZeRO spreads over devices."""

from dataclasses import dataclass, replace

from omegaconf import DictConfig

from lctrain.plan.memory import Memory

# Settings of DeepSpeed's stage 3, with defaults of a billion: an 8B model's shard leaves little room on two GPUs.
MAX_LIVE_PARAMETERS = 5 * 10**8  # parameters that are gathered at a time
SUB_GROUP = 25 * 10**7  # parameters that are updated at a time
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """ZeRO's settings (Rajbhandari et al., arXiv:1910.02054): `stage` over `num_devices`; stage 0 is no sharding."""

    stage: int
    num_devices: int
    offload_optimizer: bool
    offload_parameters: bool
    bucket_size: int
    half_precision: bool = False  # weights and gradients, beside the fp32 copy that is updated

    @classmethod
    def of(cls, cfg: DictConfig, num_devices: int) -> "Sharding":
        """Return the settings of `cfg.strategy`."""
        strategy = cfg.strategy
        return cls(
            stage=strategy.get("stage", 0),
            num_devices=num_devices,
            offload_optimizer=strategy.get("offload_optimizer", False),
            offload_parameters=strategy.get("offload_parameters", False),
            bucket_size=strategy.get("bucket_size", 0),
            half_precision=strategy.get("half_precision", False),
        )

    def apply(self, memory: Memory, num_parameters: int, largest: int) -> Memory:
        """Return one device's memory and its share of the host's, given the memory without sharding.

        `largest` is the number of elements of the largest parameter that trains.
        """
        if not self.stage:
            return memory
        share = memory.gradients // self.num_devices  # in fp32, as all that trains
        # All stages update a copy of what trains. Stage 3 is written to update in place, but it
        # compares a device with that device's name, which are never equal, and so copies too.
        optimizer, weights, host = memory.optimizer // self.num_devices + share, memory.weights, memory.host
        group = (SUB_GROUP + largest // self.num_devices) * FP32  # what stage 3 updates at a time, at the most
        updated = share if self.stage < 3 else min(share, group)
        gradients, update = memory.gradients if self.stage == 1 else self.halved(share), 2 * updated
        if self.offload_optimizer:  # which also offloads the gradients
            optimizer, gradients, update, host = 0, 0, 0, host + optimizer + 2 * share
        if self.stage == 3:
            weights = self.halved(weights)
            gathered = weights * min(MAX_LIVE_PARAMETERS, num_parameters) // num_parameters
            shard = weights // self.num_devices
            weights, host = (gathered, host + shard) if self.offload_parameters else (shard + gathered, host)
        return replace(
            memory,
            weights=weights,
            optimizer=optimizer,
            gradients=gradients,
            # Stages 1 and 2 fill one bucket while another is exchanged; stage 3 exchanges a gradient larger than a
            # bucket whole, from a copy.
            buckets=FP32 * (self.bucket_size + 2 * largest if self.stage == 3 else 2 * self.bucket_size),
            update=update,
            host=host,
        )

    def halved(self, num_bytes: int) -> int:
        """Return the bytes of weights or gradients, given those in fp32."""
        return num_bytes // 2 if self.half_precision else num_bytes
