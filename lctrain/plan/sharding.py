"""What of a step's memory ZeRO spreads over devices, as the config says it."""

from dataclasses import dataclass, replace

from omegaconf import DictConfig

from lctrain.plan.memory import Memory

MAX_LIVE_PARAMETERS = 10**9  # DeepSpeed gathers no more at a time under stage 3 (stage3_max_live_parameters)
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """ZeRO (Rajbhandari et al., arXiv:1910.02054) of `stage` over `num_devices`; 0 is none."""

    stage: int
    num_devices: int
    offload_optimizer: bool
    offload_parameters: bool
    bucket_size: int

    @classmethod
    def of(cls, cfg: DictConfig, num_devices: int) -> "Sharding":
        """What `cfg.strategy` asks for."""
        strategy = cfg.strategy
        return cls(
            stage=strategy.get("stage", 0),
            num_devices=num_devices,
            offload_optimizer=strategy.get("offload_optimizer", False),
            offload_parameters=strategy.get("offload_parameters", False),
            bucket_size=strategy.get("bucket_size", 0),
        )

    def apply(self, memory: Memory, num_parameters: int) -> Memory:
        """One device's memory, and its share of the host's, from those of a model that is whole on each device."""
        if not self.stage:
            return memory
        master = memory.gradients  # an fp32 copy of what trains, which the optimizer updates: as large as its gradients
        optimizer, weights, host = (memory.optimizer + master) // self.num_devices, memory.weights, memory.host
        if self.offload_optimizer:
            optimizer, host = 0, host + optimizer
        if self.stage == 3:
            gathered = weights * min(MAX_LIVE_PARAMETERS, num_parameters) // num_parameters
            shard = weights // self.num_devices
            weights, host = (gathered, host + shard) if self.offload_parameters else (shard + gathered, host)
        return replace(
            memory,
            weights=weights,
            optimizer=optimizer,
            gradients=memory.gradients // (self.num_devices if self.stage >= 2 else 1),
            buckets=min(self.bucket_size * FP32, memory.gradients),
            update=0 if self.offload_optimizer else memory.update // self.num_devices,
            host=host,
        )
