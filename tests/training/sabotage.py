"""Callbacks that do to a run what the world does: kill it, signal it, poison its weights, fill its disk."""

import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer


class Signal(Callback):
    """Sends this process `name` in the middle of optimizer step `step`, behind its `micro_batch`-th backward pass."""

    def __init__(self, *, name: str, step: int, micro_batch: int = 0) -> None:
        self.number, self.step, self.micro_batch = signal.Signals[name], step, micro_batch

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        index = trainer.fit_loop.batch_idx % trainer.accumulate_grad_batches
        if (trainer.global_step + 1, index) == (self.step, self.micro_batch):
            os.kill(os.getpid(), self.number)


class Poison(Callback):
    """Makes a weight NaN behind the last micro-batch but one of optimizer step `step`."""

    def __init__(self, *, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if trainer.global_step + 1 == self.step and last:
            with torch.no_grad():
                next(p for p in pl_module.parameters() if p.requires_grad).fill_(float("nan"))


class SignalWhileWriting(Callback):
    """Sends this process `name` while a checkpoint is being put together."""

    def __init__(self, *, name: str, step: int) -> None:
        self.number, self.step = signal.Signals[name], step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class FullDisk(Callback):
    """From optimizer step `step` on, the file system of `folder` has no byte left."""

    def __init__(self, *, folder: str, step: int) -> None:
        self.folder, self.step = Path(folder), step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self.step:
            with suppress(OSError):
                (self.folder / "ballast").write_bytes(bytes(2**24))
            assert not shutil.disk_usage(self.folder).free
