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
from lightning.pytorch.plugins.io import TorchCheckpointIO

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
        self._rng: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = DirectCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in SIGNALS:  # in place of Lightning's, which end the run without a checkpoint; restored behind fit
            signal.signal(number, self._on_signal)
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
        stopped = self._agree(trainer, self.stopped_by is not None)
        if stopped or step == trainer.max_steps or self._agree(trainer, due):
            self.save(trainer)
        if stopped:
            raise RunError(f"stopped by {self.stopped_by or 'another rank'} after step {step}; go on with resume=auto")

    @staticmethod
    def _agree(trainer: Trainer, decision: bool) -> bool:
        """What any rank wants: clocks and signals differ between them, and a checkpoint is written together."""
        return trainer.strategy.reduce_boolean_decision(decision, all=False)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rng = state_dict["rng"]

    def save(self, trainer: Trainer) -> None:
        """Write step-N.ckpt, then delete the oldest beyond `num_kept`. RunError if the disk refuses."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        aside = final.with_suffix(".partial")
        try:
            trainer.save_checkpoint(aside, weights_only=False)
            if trainer.is_global_zero:
                aside.replace(final)
        except OSError as error:
            aside.unlink(missing_ok=True)
            message = f"checkpoint of step {trainer.global_step} could not be written to {self.folder}: {error}"
            raise RunError(message) from error
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:  # a later one is a broken one that was skipped: it must not count as kept
            for old in [path for path in self.written() if path <= final][: -self.num_kept]:
                old.unlink()

    def written(self) -> list[Path]:
        """Oldest to newest."""
        return sorted(self.folder.glob("step-*.ckpt"))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = signal.Signals(number).name


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes where it is told, without a copy in memory or in the system's folder for temporary files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """OSError if the disk refuses; the bytes are on the disk on return."""
        with Path(path).open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's zip writer wraps, or drops, what the file raised
                raise OSError(f"{error.__context__ or error}".splitlines()[0]) from error
            file.flush()
            os.fsync(file.fileno())


def rng_state() -> dict[str, Any]:
    """Every generator's state, as types that load with weights_only."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - what libraries draw from
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
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])
