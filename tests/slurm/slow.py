"""A run that takes its time, so that it is still there when the time limit comes."""

import os
import time

from lightning import Callback


class Slow(Callback):
    """Waits behind each step, in the job's first life only."""

    def __init__(self, *, seconds: float) -> None:
        self.seconds = seconds if "SLURM_RESTART_COUNT" not in os.environ else 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(self.seconds)
