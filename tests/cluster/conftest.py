"""A cluster that is only said to be there: commands of Slurm that answer what a test wants."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from lctrain import config

PARTITION = "PartitionName=main Default=YES MaxNodes=4 MaxTime=2-00:00:00 State=UP"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts shell scripts of these names before all others; each notes its arguments in the file that is returned."""
    folder, called = tmp_path / "bin", tmp_path / "called"
    folder.mkdir()
    called.touch()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(**scripts: str) -> Path:
        for name, script in scripts.items():
            (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {called}\n{script}\n')
            (folder / name).chmod(0o755)
        return called

    return put


@pytest.fixture
def slurm(commands: Callable[..., Path]) -> Path:
    """Four nodes of 16 CPUs and 8 GPUs, an empty queue, and job 77 for whoever submits."""
    return commands(
        scontrol=f"echo '{PARTITION}'",
        sinfo="for n in 1 2 3 4; do echo \"node$n|16|512000|gpu:h100:8(S:0-1)\"; done",
        squeue="",
        sacct="",
        scancel="",
        sbatch='cat > /dev/null; [[ $1 == --parsable ]] && echo 77; true',
    )  # fmt: skip


@pytest.fixture
def submission(small: Callable[..., list[str]]) -> Callable[..., DictConfig]:
    """The config of `lctrain submit` of a small run under overrides."""

    def compose(*overrides: str) -> DictConfig:
        cpu = ["slurm.gpus_per_node=0", "slurm.tasks_per_node=1", "slurm.cpus_per_task=1"]
        cfg = config.compose("submit", [*cpu, *small(*overrides)])
        config.anchor_paths(cfg)
        config.check(cfg)
        return cfg

    return compose
