"""Write and read checkpoints: one file per rank, which any number of ranks can read, with any sharding.

    step-00000020.ckpt/state.pt                   the loop, the schedule, the callbacks: the same for every rank
    step-00000020.ckpt/rank-00001-of-00004.pt     whole parameters with their optimizer states, and a rank's own state

Each parameter that trains is in one rank's file, in fp32, under its name in the model. So files are written in
parallel, and single device, data parallel and ZeRO runs read each other's checkpoints.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lctrain.errors import InputError
from lctrain.folder import RANK_FILE, STATE_FILE, rank_files

VALUE = "value"  # key of the parameter itself, beside its optimizer states

ParameterState = dict[str, Tensor]


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` and return when its bytes are on the disk. Raises OSError if the disk refuses them."""
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's zip writer wraps, or drops, the error that the file raised
            raise OSError(f"{error.__context__ or error}".splitlines()[0]) from error
        file.flush()
        os.fsync(file.fileno())


def write_rank(folder: Path, rank: int, world_size: int, content: Mapping[str, Any]) -> None:
    """Write one rank's file; `content["parameters"]` maps parameter names to their states."""
    write(folder / RANK_FILE.format(rank=rank, world_size=world_size), content)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state that every rank needs."""
    return _read(folder / STATE_FILE)


def read_rank(folder: Path, rank: int) -> dict[str, Any] | None:
    """Return the own state of rank `rank`, without parameters; None where the checkpoint has fewer ranks."""
    files = rank_files(folder)
    if rank >= len(files):
        return None
    return {name: value for name, value in _read(files[rank]).items() if name != "parameters"}


def read_parameters(folder: Path) -> dict[str, ParameterState]:
    """Return name → states of every parameter in the checkpoint, mapped into memory and read only when used."""
    found = {name: state for file in rank_files(folder) for name, state in _read(file)["parameters"].items()}
    return {_renamed(name): state for name, state in found.items()}


def read_values(folder: Path) -> dict[str, Tensor]:
    """Return name → parameter, without optimizer states."""
    return {name: state[VALUE] for name, state in read_parameters(folder).items()}


def check_names(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise InputError unless the checkpoint holds exactly the parameters that train."""
    if differ := sorted(found.keys() ^ wanted.keys()):
        raise InputError(f"{folder} was written with another tuning: {len(differ)} parameters differ, e.g. {differ[0]}")


def _renamed(name: str) -> str:
    """Return today's name of a parameter: DuoAttention's gates were parameters of the attention module itself."""
    return name.replace("self_attn.head_gates", "self_attn.duo.head_gates")


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content
