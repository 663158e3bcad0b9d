"""A profile of one step: a profiler trace, the share of time the device is busy, and the host's waits for it."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from lctrain.benchmark.measure import measure
from lctrain.tables import show

MAX_NAME = 56  # letters of a kernel's name in the table; trace_summary.json has the whole name
SYNCHRONIZATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A profile of one step: seconds from its first to its last kernel, the share in which one ran, longest kinds."""

    seconds: float
    busy: float
    num_synchronizations: int  # of the host with the device, those of the trainer included
    num_compilations: int  # in steps after the first
    kernels: list[tuple[str, float]]  # seconds


def trace(cfg: DictConfig) -> Traced:
    """Trace the third step of the configured model with random weights, at the first of `lengths`.

    Write trace.json.gz, for chrome://tracing or Perfetto, and trace_summary.json into run_dir.
    """
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    profiled = _Profiled(folder / "trace.json.gz")
    measure(cfg, cfg.lengths[0], num_steps=2, profiled=profiled)
    traced = profiled.traced
    assert traced is not None
    (folder / "trace_summary.json").write_text(json.dumps(asdict(traced), indent=2) + "\n")
    show(table(traced))
    print(
        f"{traced.seconds:.3f} s, {traced.busy:.2%} of it busy; {traced.num_synchronizations} waits of the host, "
        f"{traced.num_compilations} compilations after the first step; {folder}"
    )
    return traced


def table(traced: Traced) -> Table:
    """Return a table with a line per kind of kernel."""
    shown = Table("kernel", "ms", "share")
    for name, seconds in traced.kernels:
        shown.add_row(name[:MAX_NAME], f"{1e3 * seconds:.1f}", f"{seconds / traced.seconds:.1%}")
    return shown


class _Profiled(Callback):
    def __init__(self, target: Path) -> None:
        self.traced: Traced | None = None
        self._target, self._compiled = target, 0
        self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self._compiled = _num_compilations()
        if batch_idx == 2:
            self._profile.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx != 2:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._target))
        self.traced = summarize(self._profile.events(), _num_compilations() - self._compiled)


class Exchanges(Callback):
    """A callback that traces one step, counted from 0: the seconds in which its device runs only exchanges."""

    def __init__(self, step: int) -> None:
        self.waiting: float | None = None  # None without a CUDA device
        self._step = step
        self._profile = profile(activities=[ProfilerActivity.CUDA]) if torch.cuda.is_available() else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._profile is not None and batch_idx == self._step:
            self._profile.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profile is not None and batch_idx == self._step:
            torch.cuda.synchronize()
            self._profile.stop()
            self.waiting = seconds_exchanging(self._profile.events())


def seconds_exchanging(events: Iterable[Any]) -> float:
    """Return the seconds in which NCCL's kernels run and no others do."""
    kernels = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
    spans = sorted((event.time_range.start, event.time_range.end, event.name.startswith("nccl")) for event in kernels)
    computing = [(start, end) for start, end, exchanges in spans if not exchanges]
    return (_covered([(start, end) for start, end, _ in spans]) - _covered(computing)) / 1e6


def _num_compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def summarize(events: Iterable[Any], num_compilations: int) -> Traced:
    """Summarize a profile's events; without a device, the host's operations are used instead."""
    events = list(events)
    on_device = [
        event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation
    ] or events
    spans = sorted((event.time_range.start, event.time_range.end) for event in on_device)
    kinds: dict[str, float] = {}
    for event in on_device:
        kinds[event.name] = kinds.get(event.name, 0.0) + (event.time_range.end - event.time_range.start) / 1e6
    seconds = (max(end for _, end in spans) - spans[0][0]) / 1e6
    return Traced(
        seconds=seconds,
        busy=_covered(spans) / 1e6 / seconds,
        num_synchronizations=sum(event.name in SYNCHRONIZATIONS for event in events),
        num_compilations=num_compilations,
        kernels=sorted(kinds.items(), key=lambda kind: -kind[1])[:25],
    )


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of sorted spans."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
