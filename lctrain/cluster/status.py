"""`lctrain status`: what each run's folder and Slurm say of it."""

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
from lctrain.folder import RunFolder, read_history
from lctrain.tables import show


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as its folder tells it; `rows` are those of its metrics.jsonl."""

    folder: Path
    job_id: str | None
    max_steps: int | None  # None of an evaluation
    reported: bool
    rows: Sequence[dict[str, float]]
    held: bool  # by a process on this machine

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    def state(self, jobs: dict[str, JobState]) -> str:
        """Slurm's word where it has one for a job that is not over, else the folder's."""
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
        """From the median step of the last fifty; None before there are two."""
        recent = self.rows[-51:]
        seconds = [(b["tokens"] - a["tokens"]) / b["tokens_per_second"] for a, b in pairwise(recent)]
        return statistics.median(seconds) * (self.max_steps - self.step) if seconds and self.max_steps else None


def main(cfg: DictConfig) -> None:
    """Print a row for each run. InputError where there is none."""
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
    """Those with a run's config, in order; an array's runs instead of the folder above them."""
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
    )


def _job_id(folder: Path) -> str | None:
    """Of the job that was submitted for the folder, or of the array's task whose folder it is."""
    if (folder / JOB_ID).exists():
        return (folder / JOB_ID).read_text().strip()
    above = folder.parent / JOB_ID
    return f"{above.read_text().strip()}_{folder.name}" if above.exists() else None


def _is_held(lock: Path) -> bool:
    """Whether a process on this machine runs in the folder."""
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
