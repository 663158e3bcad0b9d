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
        )

    def apply(self, memory: Memory, num_parameters: int, largest: int) -> Memory:
        """Return one device's memory and its share of the host's, given the memory without sharding.

        `largest` is the number of elements of the largest parameter that trains.
        """
        if not self.stage:
            return memory
        share = memory.gradients // self.num_devices  # in fp32, as all that trains
        # All stages update a copy of what trains, except stage 3 without offloading, which updates in place.
        copied = share if self.stage < 3 or self.offload_optimizer else 0
        updated = share if self.stage < 3 else min(share, SUB_GROUP * FP32)  # bytes updated at a time
        optimizer, weights, host = memory.optimizer // self.num_devices + copied, memory.weights, memory.host
        gradients, update = memory.gradients if self.stage == 1 else share, 2 * updated
        if self.offload_optimizer:  # which also offloads the gradients
            optimizer, gradients, update, host = 0, 0, 0, host + optimizer + 2 * share
        if self.stage == 3:
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
