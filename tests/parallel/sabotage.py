"""Callbacks that hurt one rank of a run, or look at it; named in a case's overrides."""

import ctypes
import os
import signal
import time

import torch
import torch.distributed as dist
from lightning import Callback
from torch import nn

from lctrain.plan.simulation import Storages


class Hurt(Callback):
    """Sends `name` to rank `rank` before optimizer step `step` + 1."""

    def __init__(self, *, rank: int, step: int, name: str) -> None:
        self.rank, self.step, self.number = rank, step, signal.Signals[name]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            time.sleep(2)  # as long as a step of a real run takes: the watchdog has looked by then
            os.kill(os.getpid(), self.number)


class Sleep(Callback):
    """Rank `rank` never comes back from its batch of step `step` + 1."""

    def __init__(self, *, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            time.sleep(3600)


class Wait(Callback):
    """Rank `rank` enters an exchange before optimizer step `step` + 1 that the others never enter."""

    def __init__(self, *, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_start(self, trainer, pl_module):
        self.one = torch.ones(1, device=pl_module.device)
        self.group = dist.new_group(list(range(trainer.world_size)))
        dist.all_reduce(self.one, group=self.group)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            dist.all_reduce(self.one, group=self.group)
            self.one.item()


class Clutch(Callback):
    """Rank `rank` hangs in C before optimizer step `step` + 1, and keeps Python's lock."""

    def __init__(self, *, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            ctypes.PyDLL(None).sleep(3600)


class Fill(Callback):
    """Rank `rank` runs out of its share of a card's memory in the backward of optimizer step `step` + 1."""

    def __init__(self, *, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_after_backward(self, trainer, pl_module):
        if (trainer.global_rank, trainer.global_step) != (self.rank, self.step):
            return
        if pl_module.device.type == "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has less.")
        torch.cuda.set_per_process_memory_fraction(0.05)  # others train on the same card
        kept = []
        while True:
            kept.append(torch.empty(2**30, dtype=torch.uint8, device=pl_module.device))


class Loading(Callback):
    """Counts the bytes that live at a time while the model is built, and what is left of them behind it."""

    def setup(self, trainer, pl_module, stage):
        self.storages = Storages()
        self.storages.__enter__()

    def on_fit_start(self, trainer, pl_module):
        self.storages.__exit__(None, None, None)
        parameters: list[nn.Parameter] = list(pl_module.parameters())
        whole = sum(p.ds_numel * p.element_size() for p in parameters)
        kept = sum(p.ds_tensor.numel() * p.element_size() for p in parameters)
        assert whole > 50_000  # bytes, or nothing below means anything
        assert kept < 0.3 * whole, (kept, whole)
        # The file is read into the host's memory, here the same as the device's; beside it no model may stand whole.
        assert self.storages.peak < whole + 0.7 * whole, (self.storages.peak, whole)
        print(f"loaded: {self.storages.peak / whole:.2f} of the model at most, {kept / whole:.2f} kept", flush=True)
