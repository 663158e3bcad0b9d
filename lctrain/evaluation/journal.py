"""A file of the cells that an evaluation has measured, so that a stopped evaluation resumes with the next cell."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

from lctrain.errors import InputError, Stopped
from lctrain.folder import read_history

Cell = tuple[str | int | float, ...]
"""The identity of one measurement: label, task, and the numbers that tell the task's cells apart."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Journal(AbstractContextManager["Journal"]):
    """A file with a line of JSON per cell, written as soon as the cell is measured; without a path nothing is written.

    Inside `with`, SIGTERM and SIGUSR1 let the current cell finish, then raise Stopped.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.stopped_by: str | None = None
        rows = read_history(path) if path else []
        self.measured: dict[Cell, Any] = {tuple(row["cell"]): row["measured"] for row in rows}
        if path and path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a line that a crash cut off

    def __contains__(self, cell: Cell) -> bool:
        return cell in self.measured

    def once(self, cell: Cell, measure: Callable[[], Any]) -> Any:
        """Return the value of `cell`, converted by JSON: the recorded value if there is one, else that of `measure`."""
        if cell not in self.measured:
            line = json.dumps({"cell": cell, "measured": measure()})
            self._append(line)
            self.measured[cell] = json.loads(line)["measured"]
            if self.stopped_by:
                raise Stopped(f"stopped by {self.stopped_by}; go on with resume=auto")
        return self.measured[cell]

    def require(self, what: str, now: Any) -> None:
        """Raise InputError if `what` has changed since the journal began: its cells would not be comparable."""
        if self.once((what,), lambda: now) != now:
            raise InputError(f"resume=auto: {what} changed since {self.path} began; choose another run_dir")

    def _append(self, line: str) -> None:
        if self.path:
            with self.path.open("a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())

    def __enter__(self) -> "Journal":
        self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = signal.Signals(number).name
