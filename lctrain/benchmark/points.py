"""A JSON lines file of measured points, which are not measured again, so that a benchmark can take several short calls.

A point that failed is tried again, unless it ran out of memory.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "lightning",
    "deepspeed",
    "triton",
    "liger-kernel",
    "flash-attn-4",
    "flash-attn",
    "trl",
)

DOES_NOT_FIT = "out of memory"

Row = dict[str, Any]


class Points:
    """The results in one file, each with the device and the versions it was measured on.

    A result of another device is another point. After `minutes` no point is begun; the same command continues.
    """

    def __init__(self, target: Path, minutes: float | None) -> None:
        self.target = target
        self.rows: list[Row] = []
        self.skipped = 0
        self._ends = None if minutes is None else time.monotonic() + 60 * minutes
        self._known: list[Row] = (
            [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else []
        )

    def measure(self, point: Row, run: Callable[[], Row]) -> Row | None:
        """Return the result of `point`, from the file or by `run`; None if time is up."""
        where = point | {"device": device_name()}
        for row in self.rows + self._known:
            settled = row.get("error", DOES_NOT_FIT) == DOES_NOT_FIT or row in self.rows
            if settled and all(row.get(name) == value for name, value in where.items()):
                self.rows += [] if row in self.rows else [row]
                return row
        if self.is_over():
            self.skipped += 1
            return None
        return self.add(where | run())

    def add(self, row: Row) -> Row:
        """Write `row` into the file at once, since the next point may take minutes, and return it."""
        row = row | {"device": device_name(), "versions": versions()}
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with self.target.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row

    def is_over(self) -> bool:
        """Return whether `minutes` have passed."""
        return self._ends is not None and time.monotonic() > self._ends

    def told(self) -> str:
        """Return a message: the file, and whether points are left to measure."""
        return f"{self.target}; time is up, the same command measures the rest" if self.skipped else str(self.target)


def fingerprint(*settings: DictConfig) -> str:
    """Return a short hash that tells points of different settings apart."""
    text = "\n".join(OmegaConf.to_yaml(each, resolve=True) for each in settings)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def last_line(text: str) -> str:
    """Return the last line that a failed process printed."""
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def device_name() -> str:
    """Return the name of the card, or of the processor without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that influence the speed of a step."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None
