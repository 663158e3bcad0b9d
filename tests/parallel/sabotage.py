"""Callbacks that hurt one rank of a run, or look at it; named in a case's overrides."""

import os
import signal
import time

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
