"""Measured points in a JSON lines file. What is there is not measured again: a ladder may take several short calls.

What failed is tried again, unless it did not fit.
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

PACKAGES = ("torch", "transformers", "peft", "lightning", "deepspeed", "triton", "liger-kernel", "flash-attn-4", "trl")

DOES_NOT_FIT = "out of memory"

Row = dict[str, Any]


class Points:
    """The rows of one file, each with what it was measured on. Another card's are other points.

    Behind `minutes` no point is begun; the same command goes on where it stopped.
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
        """The row of `point`, from the file or by `run`; None where time is up."""
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
        """Writes it down at once: the next point may take minutes."""
        row = row | {"device": device_name(), "versions": versions()}
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with self.target.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row

    def is_over(self) -> bool:
        """Whether `minutes` have passed."""
        return self._ends is not None and time.monotonic() > self._ends

    def told(self) -> str:
        """Where the rows are, and whether there are more to come."""
        return f"{self.target}; time is up, the same command measures the rest" if self.skipped else str(self.target)


def fingerprint(*settings: DictConfig) -> str:
    """Tells points of other settings apart."""
    text = "\n".join(OmegaConf.to_yaml(each, resolve=True) for each in settings)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def last_line(text: str) -> str:
    """What a process that failed said last."""
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def device_name() -> str:
    """The card, or else the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()


def versions() -> dict[str, str | None]:
    """Of the packages that decide how fast a step is."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None
