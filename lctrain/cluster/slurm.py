"""Calls of Slurm's commands, and their parsed answers."""

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lctrain.errors import InputError

JOB_ID = "job_id.txt"  # file in the folder of a submitted run
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD")


def installed() -> bool:
    """Return whether Slurm's commands are on this machine."""
    return shutil.which("sbatch") is not None


def call(*command: str, given: str = "") -> str:
    """Run a command with `given` as its input and return what it prints.

    Raise InputError with the command's own message if it fails, or if Slurm is not installed.
    """
    if not shutil.which(command[0]):
        raise InputError(f"no {command[0]} on this machine: Slurm is not installed here")
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise InputError(said[-1] if said else f"{command[0]} failed with exit code {done.returncode}")
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class JobState:
    """The state of one job, or of one task of an array."""

    job_id: str
    state: str
    reason: str

    @property
    def active(self) -> bool:
        """Return whether the job waits or runs."""
        return self.state in ACTIVE


def job_states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Return the state of each job from squeue, or from sacct if squeue no longer lists the job.

    Jobs that neither knows are left out. The key of an array's task is `<array>_<task>`.
    """
    wanted = set(job_ids)
    found: dict[str, JobState] = {}
    if not wanted or not installed():
        return found
    # One call lists all jobs: squeue refuses a list of ids as a whole if it has forgotten one of them.
    queued = _try("squeue", "--noheader", "--states=all", "--array", "--format=%i|%T|%r")
    ended = _try(
        *("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(sorted(wanted))}"),
        "--format=JobID,State",
    )
    for line in [*ended.splitlines(), *queued.splitlines()]:  # squeue last: its state is the newer one
        job_id, state, reason = (*line.split("|"), "")[:3]
        if job_id in wanted or job_id.partition("_")[0] in wanted:
            found[job_id] = JobState(job_id=job_id, state=state.split()[0], reason=reason.replace("None", ""))
    return found


def _try(*command: str) -> str:
    try:
        return call(*command)
    except InputError:  # the command is not installed, or the cluster keeps no accounts
        return ""


def partition_limits(name: str | None) -> Mapping[str, str]:
    """Return scontrol's settings of a partition, by default the default one. Raise InputError if there is none."""
    for line in call("scontrol", "--oneliner", "show", "partition", *([name] if name else [])).splitlines():
        limits = dict(re.findall(r"(\S+?)=(\S*)", line))
        if name or limits.get("Default") == "YES":
            return limits
    raise InputError("the cluster has no default partition; give slurm.partition=…")


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of a partition; memory in MiB."""

    name: str
    cpus: int
    memory: int
    gpus: int


def nodes(partition: str) -> list[Node]:
    """Return the nodes of a partition."""
    found = []
    for line in call("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%c|%m|%G").splitlines():
        name, cpus, memory, gres = line.split("|")
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))
        found.append(Node(name=name, cpus=int(cpus), memory=int(memory.rstrip("+")), gpus=gpus))
    return found
