"""Strategies that spread a run over devices; all write and read the same checkpoint format."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.nn import Parameter

from lctrain import checkpoint
from lctrain.checkpoint import VALUE, ParameterState
from lctrain.errors import InputError
from lctrain.folder import STATE_FILE
from lctrain.plan.sharding import MAX_LIVE_PARAMETERS, SUB_GROUP
from lctrain.training.generators import restore_rng, rng_state


class ShardedCheckpoints(Strategy):
    """A strategy in which each rank writes a share of the trained parameters, each of them whole, and reads what it
    needs.

    Where a strategy keeps parameters and optimizer states whole, `parameter_state` and `load_parameter` read and write
    them directly; a strategy that shards them overrides both, to gather and scatter one parameter at a time.
    """

    global_rank: int
    world_size: int

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # states are loaded into optimizers and shards, which must exist first

    def trained(self) -> dict[str, Parameter]:
        """Return the trained parameters, which a checkpoint holds, by name."""
        assert self.lightning_module is not None
        return {name: p for name, p in self.lightning_module.named_parameters() if p.requires_grad}

    def whole(self, parameter: Parameter) -> Tensor:
        """Return the whole trained parameter in fp32. A collective call: all ranks ask for the same parameter."""
        return parameter.detach()

    def parameter_state(self, parameter: Parameter) -> ParameterState:
        """Return the whole parameter and its optimizer states. A collective call, too."""
        return {VALUE: self.whole(parameter), **self.torch_optimizer.state.get(parameter, {})}

    def load_parameter(self, parameter: Parameter, state: ParameterState) -> None:
        """Set the parameter and its optimizer states to what `parameter_state` returned."""
        parameter.data.copy_(state[VALUE])
        if len(state) > 1:
            self.torch_optimizer.state[parameter] = {
                name: entry.clone() if entry.dim() == 0 else entry.to(parameter.device, copy=True)
                for name, entry in state.items()
                if name != VALUE
            }

    def teardown(self) -> None:
        """Drop the optimizers after a fit, without Lightning's move to the host, which may lack room for them."""
        self.optimizers, self.lr_scheduler_configs = [], []
        super().teardown()

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """Return torch's own optimizer, without wrappers."""
        return self.optimizers[0]

    @property
    def zero3(self) -> dict[str, Any] | None:
        """Return DeepSpeed's config if parameters are sharded while they are loaded (stage 3), else None."""
        return None

    def gradient_norm(self) -> float | None:
        """Return the norm of the whole gradient before clipping; None if it is known only after the step."""
        gradients = [p.grad for p in self.trained().values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def applied_gradient_norm(self) -> float:
        """Return the last step's gradient norm where `gradient_norm` is None; not finite if that step was skipped."""
        raise NotImplementedError

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # `save_checkpoint` writes the parameters, one at a time

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint_: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write this rank's file into the new folder `filepath`; the first rank also writes the state that all share.

        Raises OSError on every rank if any rank's write fails.
        """
        folder, mine = Path(filepath), {}
        for i, (name, parameter) in enumerate(self.trained().items()):
            state = self.parameter_state(parameter)
            if i % self.world_size == self.global_rank:
                mine[name] = {key: entry.cpu() for key, entry in state.items() if isinstance(entry, Tensor)}
        with self._together():
            if self.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)  # the remains of a crash
                folder.mkdir(parents=True)
                groups = [{k: v for k, v in g.items() if k != "params"} for g in self.torch_optimizer.param_groups]
                checkpoint.write(folder / STATE_FILE, {**checkpoint_, "param_groups": groups})
        with self._together():
            content = {"parameters": mine, "rng": rng_state()}
            checkpoint.write_rank(folder, self.global_rank, self.world_size, content)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Raise an OSError of any rank on all ranks, so that none waits for a rank that failed."""
        refused: OSError | None = None
        try:
            yield
        except OSError as error:
            refused = error
        if self.reduce_boolean_decision(refused is not None, all=False):
            raise refused or OSError("another rank's disk refused")

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        self._checkpoint = Path(self.broadcast(str(checkpoint_path)))  # of which the first rank verified the checksums
        return checkpoint.read_state(self._checkpoint)

    def load_model_state_dict(self, checkpoint_: Mapping[str, Any], strict: bool = True) -> None:
        found, trained = checkpoint.read_parameters(self._checkpoint), self.trained()
        checkpoint.check_names(self._checkpoint, found, trained)
        for name, parameter in trained.items():
            self.load_parameter(parameter, found[name])

    def load_optimizer_state_dict(self, checkpoint_: Mapping[str, Any]) -> None:
        for group, saved in zip(self.torch_optimizer.param_groups, checkpoint_["param_groups"], strict=True):
            group.update(saved)
        mine = checkpoint.read_rank(self._checkpoint, self.global_rank)
        if mine is not None:  # otherwise the run had fewer ranks, and this rank's generators stay as seeded
            restore_rng(mine["rng"])

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True


class SingleDevice(ShardedCheckpoints, SingleDeviceStrategy):
    """A strategy for one process on one device."""

    @property
    def root_device(self) -> torch.device:
        return self._root_device

    @property
    def parallel_devices(self) -> list[torch.device]:
        """Return nothing; the trainer calls the setter with the device that `trainer.devices` means."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) != 1:
            raise InputError(
                f"strategy=single is for one device, trainer.devices gives {len(devices)}; use ddp or zero1"
            )
        self._root_device = devices[0]


class DDP(ShardedCheckpoints, DDPStrategy):
    """A strategy in which each device holds the whole model and reads rows of its own; gradients are averaged
    (DistributedDataParallel).
    """

    def __init__(self, *, timeout_minutes: float) -> None:
        super().__init__(timeout=timedelta(minutes=timeout_minutes), gradient_as_bucket_view=True)


class ZeRO(ShardedCheckpoints, DeepSpeedStrategy):
    """ZeRO (Rajbhandari et al., arXiv:1910.02054) by DeepSpeed: training states are sharded over all devices.

    Stage 1 shards optimizer states, stage 2 also gradients, stage 3 also parameters, of which a device then holds only
    the running layer's whole. Offloading keeps optimizer states (and under stage 3 parameters) in the host's memory.
    Trained parameters are kept in fp32 and the forward autocasts, as without ZeRO, so that all strategies compute the
    same. With `half_precision`, stage 3 keeps the weights of a whole model that trains, and their gradients, in bf16
    beside the fp32 shards that it updates: 16 bytes a parameter instead of 20 with Adam, and losses that differ from
    those of other strategies, because norms, embeddings and sums over micro-batches are rounded.

    Deviations from Lightning's DeepSpeedStrategy: this one also runs on CPU devices (gloo), divides gradients by the
    accumulation once instead of twice, and writes the same checkpoints as all other strategies.
    """

    def __init__(
        self,
        *,
        stage: int,
        offload_optimizer: bool,
        offload_parameters: bool,
        bucket_size: int,
        half_precision: bool,
        timeout_minutes: float,
    ) -> None:
        if stage not in (1, 2, 3):
            raise InputError(f"strategy.stage={stage} is none of 1, 2, 3")
        if offload_parameters and stage != 3:
            raise InputError(f"strategy.offload_parameters needs stage 3, which shards them; this is stage {stage}")
        if half_precision and (stage != 3 or offload_optimizer):
            raise InputError("strategy.half_precision needs stage 3 without strategy.offload_optimizer")
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            allgather_bucket_size=bucket_size,
            reduce_bucket_size=bucket_size,
            sub_group_size=SUB_GROUP,
            timeout=timedelta(minutes=timeout_minutes),
        )
        assert isinstance(self.config, dict)
        self.config["zero_optimization"]["stage3_max_live_parameters"] = MAX_LIVE_PARAMETERS
        self.config["data_types"] = {"grad_accum_dtype": "bf16" if half_precision else "fp32"}
        self.config["zero_force_ds_cpu_optimizer"] = False  # torch's own optimizer runs on offloaded states

    def setup_environment(self) -> None:
        assert self.accelerator is not None
        if self.root_device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices or []))]
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        import deepspeed

        if self.root_device.type == "cpu":  # otherwise DeepSpeed first compiles a C++ extension, for a minute
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super().setup_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Do nothing: the recipe already shards what it loads, by `zero3`."""
        yield

    @property
    def zero3(self) -> dict[str, Any] | None:
        """Return DeepSpeed's config under stage 3, which shards parameters; else None."""
        self._init_config_if_needed()
        assert isinstance(self.config, dict)
        return {"train_micro_batch_size_per_gpu": 1, **self.config} if self.zero_stage_3 else None

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        return cast(torch.optim.Optimizer, self.deepspeed_engine.optimizer.optimizer)

    def gradient_norm(self) -> None:
        return None

    def applied_gradient_norm(self) -> float:
        if not self.deepspeed_engine.was_step_applied():
            return float("nan")
        return float(self.deepspeed_engine.get_global_grad_norm())

    def whole(self, parameter: Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        return cast(Tensor, safe_get_full_fp32_param(parameter))

    def parameter_state(self, parameter: Parameter) -> ParameterState:
        from deepspeed.utils import safe_get_full_optimizer_state

        flat: ParameterState = next(iter(self.torch_optimizer.state.values()), {})
        return {VALUE: self.whole(parameter)} | {
            name: safe_get_full_optimizer_state(parameter, name) if entry.dim() else entry
            for name, entry in flat.items()
            if isinstance(entry, Tensor)
        }

    def load_model_state_dict(self, checkpoint_: Mapping[str, Any], strict: bool = True) -> None:
        entries = next(iter(checkpoint.read_parameters(self._checkpoint).values()), {})
        self._make_states({name: entry for name, entry in entries.items() if name != VALUE})
        super().load_model_state_dict(checkpoint_, strict)

    def _make_states(self, entries: ParameterState) -> None:
        """Create the optimizer's states for this rank's flat shards, as the optimizer's first step would."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero = self.deepspeed_engine.optimizer
        shards = zero.fp32_partitioned_groups_flat if self.zero_stage_3 else zero.single_partition_of_fp32_groups
        for flat in shards:
            self.torch_optimizer.state[flat] = {
                name: torch.zeros_like(flat) if entry.dim() else entry.clone() for name, entry in entries.items()
            }
        if not self.zero_stage_3:
            for parameters, flat in zip(zero.bit16_groups, shards, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, self.torch_optimizer.state)

    def load_parameter(self, parameter: Parameter, state: ParameterState) -> None:
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(parameter, state[VALUE])
        for name, entry in state.items():
            if name != VALUE and entry.dim():
                safe_set_full_optimizer_state(parameter, entry, name)
        if hasattr(parameter, "ds_tensor"):  # stage 3: the shard that the forward computes with
            parameter.ds_tensor.data.copy_(safe_get_local_fp32_param(parameter))
        if parameter.numel():  # the parameter is whole here: under stages 1 and 2, or too small to be sharded
            parameter.data.copy_(state[VALUE])


def automatic(*, devices: int | str | list[int], num_nodes: int, timeout_minutes: float) -> Strategy:
    """Return `SingleDevice` for one process and `DDP` for several."""
    several = num_nodes > 1 or (len(devices) if isinstance(devices, list) else _count(devices)) > 1
    return DDP(timeout_minutes=timeout_minutes) if several else SingleDevice()


def _count(devices: int | str) -> int:
    if str(devices) in ("auto", "-1"):
        return max(1, torch.cuda.device_count())
    return int(devices) if str(devices).isdigit() else str(devices).count(",") + 1
