"""The options of a Slurm job."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lctrain.errors import InputError

TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Job:
    """The options of one job. None leaves an option to the cluster.

    `script` is the template in slurm/; `tasks_per_node` processes run on each node, one per GPU. `array` asks for a
    job per number; the number is the job's seed (for an evaluation, its length in units of 1024 tokens) and the name
    of its folder in run_dir. A run stops by itself `signal_seconds` before its `time` is up. A failed job is tried
    again at most `max_restarts` times in a row; a job that was asked to stop is always queued again. With `offline`,
    nothing is fetched from or sent to the internet. `setup` holds lines of shell.
    """

    script: Literal["auto", "train_single_node", "train_multi_node", "preemptible", "evaluate_array"]
    name: str
    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    mem: str | None
    time: str | int
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    array: str | int | Sequence[int] | None
    dependency: str | None
    signal_seconds: int
    max_restarts: int
    offline: bool
    setup: Sequence[str]

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("tasks_per_node", 1), ("cpus_per_task", 1)):
            if getattr(self, name) < least:
                raise InputError(f"slurm.{name}={getattr(self, name)} must be at least {least}")
        if self.gpus_per_node and self.tasks_per_node != self.gpus_per_node:
            raise InputError(
                f"slurm.tasks_per_node={self.tasks_per_node}: every one of the {self.gpus_per_node} GPUs of a node "
                "gets one process; set slurm.gpus_per_node"
            )
        if self.evaluates and self.array is None:
            raise InputError("slurm.array must name the lengths to evaluate, in thousands of tokens")
        if self.signal_seconds < 1 or self.max_restarts < 0:
            raise InputError("slurm.signal_seconds must be at least 1 and slurm.max_restarts at least 0")
        if self.signal_seconds >= self.seconds:
            raise InputError(f"slurm.signal_seconds={self.signal_seconds} leaves nothing of slurm.time={self.time}")

    @property
    def seconds(self) -> int:
        """Return `time` in seconds (from minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]])."""
        return parse_time(str(self.time))

    @property
    def evaluates(self) -> bool:
        """Return whether the job measures a model instead of training one."""
        return self.script == "evaluate_array"

    @property
    def template(self) -> str:
        """Return the name of the script in slurm/ that is filled in."""
        return self.script if self.script != "auto" else f"train_{'single' if self.nodes == 1 else 'multi'}_node"

    def directives(self, run_dir: Path) -> Iterator[tuple[str, object]]:
        """Yield name and value of each #SBATCH option, in the order that reads best."""
        yield "job-name", self.name
        yield "nodes", self.nodes
        yield "ntasks-per-node", self.tasks_per_node
        if self.gpus_per_node:
            yield "gpus-per-node", self.gpus_per_node
        yield "cpus-per-task", self.cpus_per_task
        yield "time", self.time
        numbers = self.array if isinstance(self.array, str | int | None) else ",".join(map(str, self.array))
        for name in ("mem", "partition", "account", "qos", "constraint", "dependency"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)
        if numbers is not None:
            yield "array", numbers
        if not self.evaluates:  # an evaluation saves each cell, so it needs no warning
            yield "signal", f"B:USR1@{self.signal_seconds}"
        yield "requeue", None
        yield "open-mode", "append"
        yield "chdir", run_dir / "code"
        yield "output", self.log(run_dir)

    def log(self, run_dir: Path) -> Path:
        """Return the log file in Slurm's notation: %j is the job's id, %A the array's id, %a the number of its task."""
        return run_dir / ("slurm-%j.log" if self.array is None else "slurm-%A_%a.log")


def parse_time(text: str) -> int:
    """Return the seconds of a time in Slurm's notation. Raise InputError if `text` is not such a time."""
    if not (match := TIME.fullmatch(text)):
        raise InputError(f"slurm.time={text} is not a time; give minutes, hours:minutes:seconds or days-hours")
    days, *parts = match.groups()
    first, second, third = (int(part or 0) for part in parts)
    if days is not None:  # days-hours:minutes:seconds
        return ((int(days) * 24 + first) * 60 + second) * 60 + third
    if parts[2] is None:  # minutes:seconds
        return first * 60 + second
    return (first * 60 + second) * 60 + third
