"""Record a run's metrics at every optimizer step, and show them as a progress line."""

import json
import math
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim import Optimizer

from lctrain.errors import RunError
from lctrain.folder import read_history, write_aside
from lctrain.plan.flops import device_peak_flops, training_flops
from lctrain.training.checkpoint import Checkpoint
from lctrain.training.strategy import ShardedCheckpoints

REPORT_EVERY_SECONDS = 10.0  # where the output is no terminal


class Metrics(Callback):
    """A callback that records loss (and its terms), perplexity, learning rate, gradient norm, speed and memory of each
    optimizer step.

    Raises RunError when the loss or gradient is not finite, before it is applied, so that the last checkpoint is good.
    """

    def __init__(self, *, folder: str) -> None:
        self.history = Path(folder) / "metrics.jsonl"
        self.last: dict[str, float] = {}
        self._tokens_seen = 0
        self._rates: list[float] = []
        self._loss = torch.zeros(())
        self._terms: dict[str, float] = {}
        self._grad_norm: float | None = None
        self._lr = 0.0
        self._step_tokens = 0
        self._started = 0.0
        self._peak_flops = 0.0
        self._flops_per_token: dict[int, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._peak_flops = device_peak_flops(pl_module.device)
        self._loss = torch.zeros((), device=pl_module.device)
        self._started = time.perf_counter()
        rows = [row for row in read_history(self.history) if row["step"] <= trainer.global_step]
        self._tokens_seen = int(rows[-1]["tokens"]) if rows else 0
        if trainer.is_global_zero:
            write_aside(self.history, "".join(json.dumps(row) + "\n" for row in rows))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()  # validation is not training time

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # Each micro-batch adds a share of the step's mean: Lightning has divided by the accumulation, and the mean over
        # ranks is taken later.
        self._loss = self._loss + loss.detach()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # DeepSpeed's engine is stepped after every micro-batch
        self._loss = trainer.strategy.reduce(self._loss, reduce_op="mean")
        terms = cast(Any, pl_module).losses if len(cast(Any, pl_module).losses) > 1 else {}
        reduced = {name: trainer.strategy.reduce(term, reduce_op="mean") for name, term in terms.items()}
        self._terms = {f"loss/{name}": float(term) for name, term in reduced.items()}
        self._require_finite(trainer, "the loss", float(self._loss), trainer.global_step + 1)
        self._grad_norm = cast(ShardedCheckpoints, trainer.strategy).gradient_norm()
        if self._grad_norm is not None:
            self._require_finite(trainer, "the gradient", self._grad_norm, trainer.global_step + 1)
        self._lr = optimizer.param_groups[0]["lr"]

    @staticmethod
    def _require_finite(trainer: Trainer, what: str, value: float, step: int) -> None:
        """Raise RunError if `value` is not finite; it names the step (which determines its batch) and a checkpoint."""
        if math.isfinite(value):
            return
        written = [path for c in trainer.callbacks if isinstance(c, Checkpoint) for path in c.written()]  # type: ignore[attr-defined]
        last = f"the last checkpoint is {written[-1]}" if written else "there is no checkpoint yet"
        raise RunError(f"{what} of step {step} is {value}; nothing was updated, {last}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step_tokens += batch["num_tokens"]
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._grad_norm is None:
            self._grad_norm = cast(ShardedCheckpoints, trainer.strategy).applied_gradient_norm()
            self._require_finite(trainer, "the gradient", self._grad_norm, trainer.global_step)
        tokens = torch.tensor(self._step_tokens, device=pl_module.device)
        self._step_tokens = int(trainer.strategy.reduce(tokens, reduce_op="sum"))
        now = time.perf_counter()
        elapsed, self._started = now - self._started, now
        self._tokens_seen += self._step_tokens
        self._record(trainer, pl_module, batch["sequence_length"], elapsed)
        self._loss, self._step_tokens = torch.zeros((), device=pl_module.device), 0

    def _record(self, trainer: Trainer, module: Any, length: int, elapsed: float) -> None:
        if length not in self._flops_per_token:
            taught = bool(module.objective.num_compared(1))
            self._flops_per_token[length] = training_flops(module.model, module.recipe.attention, length, taught)
        flops = self._flops_per_token[length] * self._step_tokens
        loss = float(self._loss)
        self.last = {
            "loss": loss,
            **({"perplexity": math.exp(min(loss, 80.0))} if module.objective.is_perplexity else {}),
            **self._terms,
            **module.measures,
            "sequence_length": length,
            "lr": self._lr,
            "grad_norm": cast(float, self._grad_norm),
            "tokens_per_second": self._step_tokens / elapsed,
            "model_flops_utilization": flops / elapsed / self._peak_flops / trainer.world_size,
            "peak_memory_gib": peak_memory_gib(),
            "tokens": self._tokens_seen,
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        }
        self._rates.append(self.last["tokens_per_second"])
        for logger in trainer.loggers:
            logger.log_metrics(self.last, step=trainer.global_step)
        if trainer.is_global_zero:
            with self.history.open("a") as history:
                history.write(json.dumps({"step": trainer.global_step, **self.last}) + "\n")

    @property
    def tokens_per_second(self) -> float:
        """Return the median over this process's steps, which the slow first step and pauses don't shift; 0 if none."""
        return statistics.median(self._rates) if self._rates else 0.0


def peak_memory_gib() -> float:
    """Return the most memory this process ever held, in GiB: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


class ProgressBar(Callback):
    """A callback that shows step, loss, perplexity, tokens/s, row length and time left in one line.

    Without a terminal, it prints a new line every REPORT_EVERY_SECONDS.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: Any = None
        self._printed = -math.inf

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        columns = (
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(), disable=not Console().is_terminal)
        self._task = self._bar.add_task("first step…", total=trainer.max_steps, completed=trainer.global_step)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is None or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        last = next(callback for callback in trainer.callbacks if isinstance(callback, Metrics)).last  # type: ignore[attr-defined]
        shown = {"perplexity": "perplexity", "gates/mean": "mean gate"}
        values = [f"{label} {last[name]:.2f}" for name, label in shown.items() if name in last]
        speed = f"{last['tokens_per_second']:,.0f} tokens/s"
        line = "  ".join([f"loss {last['loss']:.3f}", *values, speed, f"length {last['sequence_length']:,}"])
        self._bar.update(self._task, completed=trainer.global_step, description=line)
        now, finished = time.monotonic(), trainer.global_step == trainer.max_steps
        if self._bar.disable and (finished or now - self._printed > REPORT_EVERY_SECONDS):
            self._printed = now
            print(f"step {trainer.global_step}/{trainer.max_steps}  {line}  {self._eta(trainer)}", flush=True)

    def _eta(self, trainer: Trainer) -> str:
        assert self._bar is not None
        remaining = self._bar.tasks[self._task].time_remaining
        return f"{remaining / 60:.1f} min left" if remaining is not None else ""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
