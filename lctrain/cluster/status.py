"""Implement `lctrain status`: show each run's state from its folder and from Slurm."""

import fcntl
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from lctrain.cluster.slurm import JOB_ID, JobState, job_states
from lctrain.errors import InputError
from lctrain.folder import RunFolder, read_history, read_tracked
from lctrain.tables import show


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, read from its folder; `rows` are the lines of its metrics.jsonl."""

    folder: Path
    job_id: str | None
    max_steps: int | None  # None for an evaluation
    reported: bool
    rows: Sequence[dict[str, float]]
    held: bool  # a process on this machine runs in the folder
    address: str | None = None  # of its W&B run

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    def state(self, jobs: dict[str, JobState]) -> str:
        """Return Slurm's state if the job waits or runs, else the state that the folder shows."""
        job = jobs.get(self.job_id) if self.job_id else None
        if job and job.active:
            return f"{job.state.lower()} ({job.reason})" if job.reason and job.state == "PENDING" else job.state.lower()
        if self.held:
            return "running"
        if self.reported if self.max_steps is None else self.step >= self.max_steps:
            return "done"
        return job.state.lower() if job and job.state != "COMPLETED" else "stopped"

    @property
    def seconds_left(self) -> float | None:
        """Return the time left by the median of the last fifty steps; None before there are two."""
        recent = self.rows[-51:]
        seconds = [(b["tokens"] - a["tokens"]) / b["tokens_per_second"] for a, b in pairwise(recent)]
        return statistics.median(seconds) * (self.max_steps - self.step) if seconds and self.max_steps else None


def main(cfg: DictConfig) -> None:
    """Print a table with a line for each run. Raise InputError if there is no run."""
    if cfg.run_dir is not None and not (RunFolder(cfg.run_dir).config.is_file()):
        raise InputError(f"run_dir={cfg.run_dir} holds no run: it has no config.yaml")
    folders = [Path(cfg.run_dir)] if cfg.run_dir is not None else list(_folders(Path(cfg.folder)))
    if not folders:
        raise InputError(f"folder={cfg.folder} holds no runs")
    runs = [_read(folder) for folder in folders]
    jobs = job_states(run.job_id for run in runs if run.job_id)
    table = Table("run", "job", "state", "step", "loss", "tokens/s", "time left", "restarts")
    for run in runs:
        name = run.folder if cfg.run_dir is not None else run.folder.relative_to(cfg.folder)
        table.add_row(str(name), *_row(run, run.state(jobs)))
    show(table)
    for address in sorted({run.address for run in runs if run.address}):
        print(f"W&B: {address}")


def _row(run: Run, state: str) -> Iterator[str]:
    last = run.rows[-1] if run.rows else {}
    left = run.seconds_left if state == "running" else None
    yield run.job_id or ""
    yield state
    yield "evaluation" if run.max_steps is None else f"{run.step:,}/{run.max_steps:,}"
    yield f"{last['loss']:.3f}" if last else ""
    yield f"{last['tokens_per_second']:,.0f}" if last else ""
    yield str(timedelta(seconds=round(left))) if left is not None else ""
    yield str(int(last.get("restarts", 0))) if last else ""


def _folders(root: Path) -> Iterator[Path]:
    """Yield the folders that hold a run's config, in order; for an array, its runs' folders instead of its own."""
    for path, names, files in os.walk(root):
        names[:] = sorted(set(names) - {"code", "checkpoints", "exported", "wandb"})
        if "config.yaml" in files and not any((Path(path) / name / "config.yaml").exists() for name in names):
            yield Path(path)


def _read(folder: Path) -> Run:
    return Run(
        folder=folder,
        job_id=_job_id(folder),
        max_steps=OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "trainer.max_steps"),
        reported=(folder / "report.json").exists(),
        rows=read_history(folder / "metrics.jsonl"),
        held=_is_held(folder / ".lock"),
        address=read_tracked(folder).get("url"),
    )


def _job_id(folder: Path) -> str | None:
    """Return the id of the job, or of the array's task, that was submitted for the folder."""
    if (folder / JOB_ID).exists():
        return (folder / JOB_ID).read_text().strip()
    above = folder.parent / JOB_ID
    return f"{above.read_text().strip()}_{folder.name}" if above.exists() else None


def _is_held(lock: Path) -> bool:
    """Return whether a process on this machine holds the folder's lock."""
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
