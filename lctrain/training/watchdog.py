"""A rank that dies, hangs or falls behind ends the run in bounded time, by name."""

import json
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from lightning import Callback, LightningModule, Trainer

from lctrain.errors import InputError

CHECKS_PER_TIMEOUT = 20
LONGEST_PAUSE = 10.0  # seconds between two looks
GRACE = 3  # looks that a living rank's file may be late


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank last said of itself."""

    rank: int
    host: str
    pid: int
    num_writes: int  # grows for as long as the process lives
    num_beats: int  # grows with every part of a step: who waits is ahead of whom it waits for
    step: int
    doing: str
    at: str  # the line of Python that runs
    exchanges: bool  # it waits for others there

    def __str__(self) -> str:
        who = f"rank {self.rank} ({self.host}, process {self.pid})"
        return f"{who}, last seen in {self.doing} after step {self.step} at {self.at}"


class Watchdog(Callback):
    """Every rank writes how far it came into `folder`/rank-N.json; who waits for too long looks who is missing.

    A run in which nothing moved for `timeout_minutes` ends with exit code 1 and a line that names the rank that is
    gone, or furthest behind. The slowest part of a step, saving included, must be shorter than that.
    """

    def __init__(self, *, folder: str, timeout_minutes: float) -> None:
        if timeout_minutes <= 0:
            raise InputError(f"callbacks.watchdog.timeout_minutes must be positive, got {timeout_minutes}")
        self.folder, self.timeout = Path(folder), 60 * timeout_minutes
        self.pause = min(LONGEST_PAUSE, self.timeout / CHECKS_PER_TIMEOUT)
        self._stopped = threading.Event()
        self._watching: threading.Thread | None = None
        self._num_writes, self._num_beats, self._step, self._doing = 0, 0, 0, "the start"
        self._beat_at = time.monotonic()
        self._seen: dict[int, tuple[Beat, float]] = {}  # the last change of every rank's file, and when it was seen

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1:
            return
        self._rank, self._world_size, self._step = trainer.global_rank, trainer.world_size, trainer.global_step
        self._beat_at = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stopped.clear()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stopped.set()
        if self._watching is not None:
            self._watching.join()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._beat(trainer, "the forward")

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        self._beat(trainer, "the backward")

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        self._beat(trainer, "the update")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._beat(trainer, "the end")

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._beat(trainer, "validation")

    def _beat(self, trainer: Trainer, doing: str) -> None:
        self._num_beats, self._step, self._doing = self._num_beats + 1, trainer.global_step, doing
        self._beat_at = time.monotonic()

    def _watch(self) -> None:
        while not self._stopped.wait(self.pause):
            with suppress(OSError):  # a full disk is the checkpoint's to report
                self._write()
                self._look()
            if time.monotonic() - self._beat_at > self.timeout:
                self._end()

    def _write(self) -> None:
        self._num_writes += 1
        frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
        beat = Beat(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            num_writes=self._num_writes,
            num_beats=self._num_beats,
            step=self._step,
            doing=self._doing,
            at=f"{Path(frames[-1].filename).name}:{frames[-1].lineno}",
            exchanges=any(part in frames[-1].filename for part in ("/torch/distributed/", "/torch/nn/parallel/")),
        )
        aside = self._file(self._rank).with_suffix(".partial")
        aside.write_text(json.dumps(asdict(beat)))
        aside.replace(self._file(self._rank))

    def _look(self) -> None:
        for rank in range(self._world_size):
            if self._file(rank).exists():
                beat = Beat(**json.loads(self._file(rank).read_text()))
                if rank not in self._seen or self._seen[rank][0] != beat:
                    self._seen[rank] = beat, time.monotonic()

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _gone(self) -> list[Beat]:
        """Whose file no longer changes."""
        now = time.monotonic()
        return [beat for beat, seen_at in self._seen.values() if now - seen_at > GRACE * self.pause]

    def _end(self) -> NoReturn:
        gone, beats = self._gone(), [beat for beat, _ in self._seen.values()]
        if self._rank == min((beat.rank for beat in beats if beat not in gone), default=self._rank):
            last = min(beats, key=lambda beat: (beat.num_beats, beat.exchanges))
            who = f"{gone[0]}, is gone" if gone else f"{last}, keeps the others waiting"
            print(f"error: nothing moved for {self.timeout / 60:g} minutes: {who}", file=sys.stderr, flush=True)
        time.sleep(self.pause)  # until the others have come to the same end
        os._exit(1)

    def lost(self) -> str | None:
        """Who is gone, if anybody is; waits until the others could have shown that they live."""
        if self._watching is None:
            return None
        time.sleep((GRACE + 2) * self.pause)
        gone = self._gone()
        return f"{gone[0]}, is gone; go on with resume=auto" if gone else None
