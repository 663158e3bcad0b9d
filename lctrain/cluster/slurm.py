"""Slurm's commands, and what they say."""

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lctrain.errors import InputError

JOB_ID = "job_id.txt"  # in the folder of a run that was submitted
ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD")


def installed() -> bool:
    """Whether this machine can talk to a cluster."""
    return shutil.which("sbatch") is not None


def call(*command: str, given: str = "") -> str:
    """What a command prints, `given` a text. InputError in its words where it refuses, or where Slurm is not here."""
    if not shutil.which(command[0]):
        raise InputError(f"no {command[0]} on this machine: Slurm is not installed here")
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise InputError(said[-1] if said else f"{command[0]} failed with exit code {done.returncode}")
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class JobState:
    """One job, or one task of an array."""

    job_id: str
    state: str
    reason: str

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE


def job_states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """What squeue says of these jobs, or, of those that it has forgotten, sacct; nothing where neither knows them.

    Tasks of an array are found under `<array>_<task>`.
    """
    wanted = set(job_ids)
    found: dict[str, JobState] = {}
    if not wanted or not installed():
        return found
    # Each asked for alone would be a call a job; a list is refused as a whole where one of it is forgotten.
    queued = _try("squeue", "--noheader", "--states=all", "--array", "--format=%i|%T|%r")
    ended = _try(
        *("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(sorted(wanted))}"),
        "--format=JobID,State",
    )
    for line in [*ended.splitlines(), *queued.splitlines()]:  # the queue's word is the newer one
        job_id, state, reason = (*line.split("|"), "")[:3]
        if job_id in wanted or job_id.partition("_")[0] in wanted:
            found[job_id] = JobState(job_id=job_id, state=state.split()[0], reason=reason.replace("None", ""))
    return found


def _try(*command: str) -> str:
    try:
        return call(*command)
    except InputError:  # the command is not there, or keeps no accounts
        return ""


def partition_limits(name: str | None) -> Mapping[str, str]:
    """What scontrol says of a partition, the default one where none is named. InputError where there is no such."""
    for line in call("scontrol", "--oneliner", "show", "partition", *([name] if name else [])).splitlines():
        limits = dict(re.findall(r"(\S+?)=(\S*)", line))
        if name or limits.get("Default") == "YES":
            return limits
    raise InputError("the cluster has no default partition; give slurm.partition=…")


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of a partition; memory in MiB."""

    name: str
    cpus: int
    memory: int
    gpus: int


def nodes(partition: str) -> list[Node]:
    """The nodes of a partition."""
    found = []
    for line in call("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%c|%m|%G").splitlines():
        name, cpus, memory, gres = line.split("|")
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))
        found.append(Node(name=name, cpus=int(cpus), memory=int(memory.rstrip("+")), gpus=gpus))
    return found
