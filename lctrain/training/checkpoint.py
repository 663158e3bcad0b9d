"""Write checkpoints on schedule and on signals, so that each is whole or absent."""

import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lctrain.errors import InputError, RunError, Stopped
from lctrain.folder import CHECKPOINTS

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GO_ON, SAVE, STOP = 0, 1, 2  # what a rank asks for after a step


class Checkpoint(Callback):
    """A callback that saves the run every so many optimizer steps or minutes, at the end, and on SIGTERM or SIGUSR1.

    The signals only set a flag: the step is finished, a checkpoint is written, then the run ends. All ranks write a
    checkpoint under a temporary name, which is replaced by the final one once all of the checkpoint is on disk, so
    that a crash never leaves half a checkpoint under the final name.
    """

    def __init__(
        self, *, folder: str, every_num_steps: int | None, every_num_minutes: float | None, num_kept: int
    ) -> None:
        limits = {"num_kept": num_kept, "every_num_steps": every_num_steps}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise InputError(f"callbacks.checkpoint.{name} must be at least 1, got {value}")
        if every_num_minutes is not None and every_num_minutes <= 0:
            raise InputError(
                f"callbacks.checkpoint.every_num_minutes must be positive or null, got {every_num_minutes}"
            )
        self.folder = Path(folder)
        self.every_num_steps, self.every_num_minutes, self.num_kept = every_num_steps, every_num_minutes, num_kept
        self.stopped_by: str | None = None
        self._saved_step = -1
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in SIGNALS:  # Lightning's handlers, restored after fit, would end the run without a checkpoint
            signal.signal(number, self._on_signal)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._saved_step or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        minutes = (time.monotonic() - self._saved_at) / 60
        due = step == trainer.max_steps
        due |= self.every_num_steps is not None and step % self.every_num_steps == 0
        due |= self.every_num_minutes is not None and minutes >= self.every_num_minutes
        wish = self._agree(trainer, STOP if self.stopped_by else SAVE if due else GO_ON)
        if wish >= SAVE:
            self.save(trainer)
        if wish == STOP:
            raise Stopped(f"stopped by {self.stopped_by or 'another rank'} after step {step}; go on with resume=auto")

    @staticmethod
    def _agree(trainer: Trainer, wish: int) -> int:
        """Return the largest wish of all ranks, which write checkpoints together but differ in clocks and signals."""
        wishes = torch.tensor(wish, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(wishes, reduce_op="max"))

    def save(self, trainer: Trainer) -> None:
        """Write step-N.ckpt, then delete the oldest beyond `num_kept`. Raises RunError on every rank if any rank's disk
        fails.
        """
        final = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        aside = final.with_suffix(".partial")
        try:
            trainer.save_checkpoint(aside, weights_only=False)
            if trainer.is_global_zero:
                shutil.rmtree(final, ignore_errors=True)  # a broken checkpoint that resuming skipped
                aside.rename(final)
                _sync(self.folder)
        except OSError as error:
            if trainer.is_global_zero:
                shutil.rmtree(aside, ignore_errors=True)
            message = f"checkpoint of step {trainer.global_step} could not be written to {self.folder}: {error}"
            raise RunError(message) from error
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:  # a later checkpoint is a broken one that resuming skipped: don't count it as kept
            for old in [path for path in self.written() if path <= final][: -self.num_kept]:
                shutil.rmtree(old)

    def written(self) -> list[Path]:
        """Return the paths of all checkpoints, oldest first."""
        return sorted(self.folder.glob(CHECKPOINTS))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = signal.Signals(number).name
        told = f"{self.stopped_by}: this step is finished and a checkpoint written, then the run ends\n"
        with suppress(OSError):  # such as a full disk. Logging here could re-enter a stream in the middle of a write
            os.write(1, told.encode())


def _sync(folder: Path) -> None:
    """Flush the folder's entries, and so its renames, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
