"""Timing of whole training steps of a random model, run through Lightning as `lctrain train` does."""

import gc
import resource
import time
from dataclasses import dataclass, replace
from math import inf, isfinite
from statistics import median
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from lctrain.benchmark.peers.whole_step import is_enough
from lctrain.benchmark.random_model import RandomModel
from lctrain.data.batch import Batch
from lctrain.errors import RunError
from lctrain.memory.savings import Savings
from lctrain.parallel.mesh import Mesh
from lctrain.plan.run import resolve
from lctrain.training.module import LongContextModule

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The steps timed after `warm_up` untimed ones, of which the first compiles; peak memory in GiB."""

    length: int
    warm_up: int
    num_rows: int  # rows of that length per step
    seconds: list[float]
    loss: float
    device_memory: float
    pinned_memory: float  # pinned host memory that a step allocates
    host_memory: float  # of the process since its start
    memory: str

    @property
    def tokens_per_second(self) -> float:
        return self.num_rows * self.length / median(self.seconds)


class _Clock(Callback):
    """A callback that ends the run once at least three steps after `warm_up` have taken `budget` seconds together."""

    def __init__(self, warm_up: int, budget: float) -> None:
        self.seconds: list[float] = []
        self._warm_up, self._budget = warm_up, budget
        self.loss = float("nan")
        self.pinned = 0
        self._start, self._pinned_before = 0.0, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._pinned_before = _pinned_so_far(pl_module.device)
        synchronize(pl_module.device)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        synchronize(pl_module.device)
        self.seconds.append(time.perf_counter() - self._start)
        self.pinned = max(self.pinned, _pinned_so_far(pl_module.device) - self._pinned_before)
        self.loss = float(outputs["loss"])
        enough = is_enough(self.seconds[self._warm_up :], self._budget)
        trainer.should_stop |= trainer.strategy.reduce_boolean_decision(enough, all=False)  # ranks stop together


def measure(
    cfg: DictConfig,
    length: int,
    *,
    num_steps: int,
    budget: float = inf,
    memory: Savings | None = None,
    warm_up: int = 1,
    **callbacks: Any,
) -> Measured:
    """Train for `warm_up` + `num_steps` steps on rows of `length` random tokens, and return the times and the memory.

    Each device, or each group of devices that share a row, has one row per step. Training ends early once at least
    three timed steps have taken `budget` seconds. Raise torch.OutOfMemoryError if a step does not fit, RunError if the
    loss is not finite.
    """
    clock = _Clock(warm_up, budget)
    trainer: Trainer = instantiate(
        cfg.trainer,
        logger=False,
        callbacks=[clock, *callbacks.values()],
        max_steps=warm_up + num_steps,
        _convert_="all",
    )
    device = trainer.strategy.root_device
    mesh = Mesh(
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        sequence_parallel_size=cfg.sequence_parallel_size,
    )
    forget(device)  # before the plan reads how much memory is free
    module = _module(cfg, length, device, memory, mesh)
    memory_used = module.recipe.memory
    module.recipe.check([length], device.type, mesh.sequence_parallel_size)
    module.check(device)
    torch.manual_seed(cfg.seed)
    try:
        batches: Any = _batches(module.recipe, length, warm_up + num_steps, mesh)
        if warm_up and cfg.warm_up_length:
            batches[:warm_up] = _batches(module.recipe, min(length, cfg.warm_up_length), warm_up, mesh)
        trainer.fit(module, datamodule=_Rows(batches, mesh))
        peak = peak_memory(device)
    finally:
        trainer.strategy.teardown()
        seconds, loss, pinned = clock.seconds[warm_up:], clock.loss, clock.pinned
        del module, trainer, clock, callbacks  # Lightning binds the module's `log` to every callback
        forget(device)
    if not isfinite(loss):
        raise RunError(f"the loss at {length} tokens is {loss}")
    return Measured(
        length=length,
        warm_up=warm_up,
        num_rows=mesh.data_parallel_size,
        seconds=seconds,
        loss=loss,
        device_memory=peak,
        pinned_memory=pinned / GIB,
        host_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        memory=str(memory_used),
    )


class _Batches:
    """An iterable of batches; Lightning would treat each entry of a list as a data loader."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Any:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


class _Rows(LightningDataModule):
    """A data module that serves the given batches."""

    def __init__(self, batches: Any, mesh: Mesh) -> None:
        super().__init__()
        self._batches, self.mesh = batches, mesh

    def train_dataloader(self) -> _Batches:
        return _Batches(self._batches)


def _module(
    cfg: DictConfig, length: int, device: torch.device, memory: Savings | None, mesh: Mesh
) -> LongContextModule:
    # A copy, because Hydra resolves the module's references in place: a group set in `cfg` later would be ignored.
    module: LongContextModule = instantiate(cfg.copy().module, _convert_="all")
    recipe = RandomModel.like(module.recipe, device, sequence_length=length)
    row = OmegaConf.merge(cfg, {"sequence_length": length, "datamodule": {"micro_batch_size": 1}})
    assert isinstance(row, DictConfig)
    module.recipe = replace(recipe, memory=memory or recipe.memory)
    module.recipe = resolve(row, module.recipe, [length], device, mesh.world_size)
    return module


def _batches(recipe: Any, length: int, num_steps: int, mesh: Mesh) -> list[Batch]:
    """Return this rank's part of the rows of its group, a batch per step."""
    generator, part = torch.Generator().manual_seed(mesh.data_parallel_rank), mesh.part(length)
    vocab_size = recipe.config().get_text_config().vocab_size
    rows = torch.randint(0, vocab_size, (num_steps, 1, length + 1), generator=generator)
    num_tokens = length // mesh.sequence_parallel_size
    return [
        {
            "input_ids": row[:, :-1][:, part],
            "labels": row[:, 1:][:, part],
            "position_ids": torch.arange(length)[None, part],
            "num_tokens": num_tokens,
            "num_valid_tokens": num_tokens,
        }
        for row in rows
    ]


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Return the seconds of a clock, after the device has finished all queued work."""
    synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> float:
    """Return the peak memory allocated on a card since `forget`, in GiB."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def _pinned_so_far(device: torch.device) -> int:
    """Return the bytes of pinned memory allocated so far, freed ones included.

    The bytes in use can't be read: torch counts a block as freed only when it next looks for one of its size.
    """
    return int(torch.cuda.host_memory_stats()["active_bytes.allocated"]) if device.type == "cuda" else 0


def forget(device: torch.device) -> None:
    """Free unused memory and reset the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.init()  # resetting the peak fails on a device that was never used
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
