"""Checkpoints that are whole or absent, and the generators' state in them."""

import os
import random
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from lctrain.errors import InputError, RunError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Checkpoint(Callback):
    """Writes the run's state every so many optimizer steps or minutes, at the end, and when asked to stop.

    SIGTERM and SIGUSR1 only set a flag; the step is finished, one checkpoint written, then the run ends. A checkpoint
    is written beside its final name and renamed when it is on disk, so a crash never leaves half of one in its place.
    """

    def __init__(
        self, *, folder: str, every_num_steps: int | None, every_num_minutes: float | None, num_kept: int
    ) -> None:
        if num_kept < 1:
            raise InputError(f"callbacks.checkpoint.num_kept must be at least 1, got {num_kept}")
        self.folder = Path(folder)
        self.every_num_steps, self.every_num_minutes, self.num_kept = every_num_steps, every_num_minutes, num_kept
        self.stopped_by: str | None = None
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._rng: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        if self._rng is not None:
            restore_rng(self._rng)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._saved_step or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        minutes = (time.monotonic() - self._saved_at) / 60
        due = self.every_num_steps is not None and step % self.every_num_steps == 0
        due |= self.every_num_minutes is not None and minutes >= self.every_num_minutes
        if due or self.stopped_by or step == trainer.max_steps:
            self.save(trainer)
        if self.stopped_by:
            raise RunError(f"stopped by {self.stopped_by} after step {step}; go on with resume=auto")

    def state_dict(self) -> dict[str, Any]:
        return {"rng": rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rng = state_dict["rng"]

    def save(self, trainer: Trainer) -> None:
        """Write step-N.ckpt, then delete the oldest beyond `num_kept`. RunError if the disk refuses; older ones stay."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        aside = final.with_suffix(".partial")
        try:
            trainer.save_checkpoint(aside)
            with aside.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(aside, final)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise RunError(f"checkpoint of step {trainer.global_step} could not be written to {self.folder}: {error}") from error
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.num_kept]:
            old.unlink()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = signal.Signals(number).name


def rng_state() -> dict[str, Any]:
    """Every generator's state, as types that load with weights_only."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])
