"""End a run in bounded time, and name the rank, when a rank dies, fails, hangs or falls behind."""

import faulthandler
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning import Callback, LightningModule, Trainer

from lctrain.errors import InputError, RunError

CHECKS_PER_TIMEOUT = 20
LONGEST_PAUSE = 10.0  # seconds between two checks
GRACE = 3  # a living rank's file may be this many checks late
LAST_CHECKS = 10  # a rank that failed may take this many checks to end by itself
STDERR = 2
TORCH = str(Path(torch.__file__).parent)
EXCHANGES = tuple(str(Path(TORCH, part)) for part in ("distributed", "nn/parallel"))


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A rank's last report about itself, as written to its file."""

    rank: int
    host: str
    pid: int
    num_writes: int  # grows for as long as the process lives
    num_beats: int  # grows with every part of a step: a waiting rank has more than the rank that it waits for
    step: int
    doing: str
    at: str  # the file and line that its main thread runs
    exchanges: bool  # whether it waits there for other ranks, or for its GPU, which may wait for them
    failed: str | None  # the exception that only this rank raised

    def __str__(self) -> str:
        who = f"rank {self.rank} ({self.host}, process {self.pid})"
        return f"{who}, last seen in {self.doing} after step {self.step} at {self.at}"

    def has_ended(self) -> bool:
        """Return whether the rank's process has ended or is a zombie; False for processes on other hosts."""
        if self.host != socket.gethostname():
            return False
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][:1] in ("Z", "X")
        except FileNotFoundError:
            return Path("/proc/self").exists()


class Watchdog(Callback):
    """A callback by which each rank writes its progress to `folder`/rank-N.json, and reads the others' while it waits.

    If nothing moved for `timeout_minutes`, the run ends with exit code 1 and a line that names the rank that is gone or
    has made the least progress. If a rank failed, or died on the same host, the run ends as soon as that is seen. The
    slowest part of a step, saving included, must be shorter than the timeout.
    """

    def __init__(self, *, folder: str, timeout_minutes: float) -> None:
        if timeout_minutes <= 0:
            raise InputError(f"callbacks.watchdog.timeout_minutes must be positive, got {timeout_minutes}")
        self.folder, self.timeout = Path(folder), 60 * timeout_minutes
        self.pause = min(LONGEST_PAUSE, self.timeout / CHECKS_PER_TIMEOUT)
        self._stopped = threading.Event()
        self._watching: threading.Thread | None = None
        self._rank, self._num_writes, self._num_beats, self._step, self._doing = 0, 0, 0, 0, "the start"
        self._beat_at = time.monotonic()
        self._seen: dict[int, tuple[Beat, float]] = {}  # each rank's latest report, and when it was first seen
        self._device = torch.device("cpu")
        self._children: list[subprocess.Popen[bytes]] = []
        self._failed: str | None = None
        self._failed_at = ""
        self._leaving = self._told = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._rank, self._world_size, self._step = trainer.global_rank, trainer.world_size, trainer.global_step
        self._device, self._beat_at = trainer.strategy.root_device, time.monotonic()
        if trainer.world_size == 1:
            return
        self._adopt(getattr(trainer.strategy.launcher, "procs", []))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file(self._rank).unlink(missing_ok=True)  # an earlier run's file must not be taken for this run's
        trainer.strategy.barrier("watchdog")
        self._seen = {}
        self._stopped.clear()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def _adopt(self, children: list[subprocess.Popen[bytes]]) -> None:
        """Take over the child processes from Lightning's observer, which kills this process when one of them ends."""
        self._children.extend(children)
        children.clear()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Report an exception that only this rank raised to the others, and end this rank even if it waits for them."""
        if self._watching is None:
            return
        if isinstance(exception, RunError | InputError):  # all ranks raise these together
            self._leave()
            faulthandler.dump_traceback_later(self.timeout, exit=True, file=STDERR)
        else:
            frames = traceback.extract_tb(exception.__traceback__)
            self._failed_at = _line(frames)
            self._failed = None if _is_exchange(exception) else f"{type(exception).__name__}: {_said(exception)}"
            self._leaving, self._beat_at = True, time.monotonic()
            with suppress(OSError):
                self._write()

    def _leave(self) -> None:
        """Stop watching, and delete this rank's file so that no rank watches this one."""
        self._stopped.set()
        if self._watching is not None:
            self._watching.join()
            faulthandler.cancel_dump_traceback_later()
            with suppress(OSError):
                self._file(self._rank).unlink(missing_ok=True)

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
            # If the main thread hangs while it holds Python's lock, this loop hangs, too: faulthandler then exits.
            faulthandler.dump_traceback_later(self.timeout + LAST_CHECKS * self.pause, exit=True, file=STDERR)
            with suppress(OSError):  # a full disk is reported by the checkpoint callback
                self._write()
                self._look()
            waited = time.monotonic() - self._beat_at
            if self._leaving:
                if waited > LAST_CHECKS * self.pause:
                    self._end("" if self._told else f"error: {self._mine()}, failed: {self._failed}")
            elif waited > self.timeout:
                self._end(f"error: nothing moved for {self.timeout / 60:g} minutes: {self._lost() or self._behind()}")
            elif waited > GRACE * self.pause and (lost := self._lost(for_good=True)):
                self._end(f"error: {lost}; go on with resume=auto")

    def _write(self) -> None:
        self._num_writes += 1
        aside = self._file(self._rank).with_suffix(".partial")
        aside.write_text(json.dumps(asdict(self._mine())))
        aside.replace(self._file(self._rank))

    def _mine(self) -> Beat:
        frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
        return Beat(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            num_writes=self._num_writes,
            num_beats=self._num_beats,
            step=self._step,
            doing=self._doing,
            at=self._failed_at or _line(frames),
            exchanges=frames[-1].filename.startswith(EXCHANGES) or self._waits_for_the_card(),
            failed=self._failed,
        )

    def _waits_for_the_card(self) -> bool:
        """Return whether the GPU has work left, such as NCCL's exchanges; Python waits only where it needs a value."""
        if self._device.type != "cuda":
            return False
        try:
            return not torch.cuda.default_stream(self._device).query()
        except RuntimeError:  # the GPU failed; the next call that uses it raises
            return False

    def _look(self) -> None:
        for rank in range(self._world_size):
            try:
                beat = Beat(**json.loads(self._file(rank).read_text()))
            except (FileNotFoundError, TypeError):  # the rank stopped watching, or an older version wrote the file
                self._seen.pop(rank, None)
                continue
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = beat, time.monotonic()

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _lost(self, for_good: bool = False) -> str | None:
        """Return which rank failed or no longer writes. With `for_good`, a silent rank counts only if it has ended."""
        others = [beat for rank, (beat, _) in self._seen.items() if rank != self._rank]
        for beat in others:
            if beat.failed:
                return f"{beat}, failed: {beat.failed}"
        for beat in others:
            if self._is_late(beat.rank) and (not for_good or beat.has_ended()):
                return f"{beat}, is gone"
        return None

    def _is_late(self, rank: int) -> bool:
        return time.monotonic() - self._seen[rank][1] > GRACE * self.pause

    def _behind(self) -> str:
        """Return which rank keeps the others waiting, or where they wait for each other."""
        beats = [beat for beat, _ in self._seen.values()] or [self._mine()]
        last = [beat for beat in beats if beat.num_beats == min(beat.num_beats for beat in beats)]
        idle = [beat for beat in last if not beat.exchanges]
        if idle or len(last) < len(beats):
            return f"{(idle or last)[0]}, keeps the others waiting"
        places = {beat.at: str(beat) for beat in reversed(last)}
        return f"{'; '.join(reversed(places.values()))}: all wait for each other"

    def _end(self, told: str) -> NoReturn:
        """Print `told` on one rank, then kill the processes that this one started, and exit with code 1."""
        alive = [rank for rank, (beat, _) in self._seen.items() if not beat.failed and not self._is_late(rank)]
        if told and (self._leaving or self._rank == min(alive, default=self._rank)):
            print(told, file=sys.stderr, flush=True)
        time.sleep(self.pause)  # gives the other ranks time to come to the same end
        for child in self._children:
            child.kill()
        os._exit(1)

    def explain(self, error: Exception) -> str | None:
        """Return a line that explains `error` to the user if memory ran out or a rank was lost; otherwise None.

        After a failed exchange, this first waits until living ranks must have written again.
        """
        self._told = True
        if isinstance(error, torch.OutOfMemoryError):
            self._failed_at = self._failed_at or _line(traceback.extract_tb(error.__traceback__))
            return (
                f"{self._mine()}: {_said(error)}; memory=auto or smaller micro-batches need less, resume=auto goes on"
            )
        if self._watching is None or not _is_exchange(error):
            return None
        time.sleep((GRACE + 2) * self.pause)
        lost = self._lost()
        return f"{lost}; go on with resume=auto" if lost else None


def _is_exchange(error: BaseException) -> bool:
    return isinstance(error, torch.distributed.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))


def _said(error: BaseException) -> str:
    """Return the error's first two sentences: if memory ran out, they say how much was requested."""
    return ". ".join(next(iter(str(error).splitlines()), "").split(". ")[:2]).rstrip(".")


def _line(frames: Sequence[traceback.FrameSummary]) -> str:
    """Return file and line of the innermost frame that is not torch's."""
    own = [frame for frame in frames if not frame.filename.startswith(TORCH)] or list(frames)
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "an unknown line"
