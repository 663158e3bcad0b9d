"""Lock a run's folder, and find the checkpoints, settings and history in it."""

import fcntl
import json
import logging
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from lctrain.errors import InputError

log = logging.getLogger(__name__)

CHECKPOINTS = "step-*.ckpt"
STATE_FILE = "state.pt"
RANK_FILE = "rank-{rank:05d}-of-{world_size:05d}.pt"
TRACKED = "wandb.json"
TRACES = ("config.yaml", "metrics.jsonl", "cells.jsonl", "report.json")  # files of a run that has no checkpoint yet
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")


class RunFolder:
    """A run's folder, which one process at a time may hold."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    def resume_from(self, resume: str) -> Path | None:
        """Return the checkpoint that `resume` (never, auto, or a path) means; broken ones are skipped with a warning.

        Raises InputError where the run would overwrite another run, or no whole checkpoint is there to resume from.
        """
        if resume == "never":
            if is_first_process() and (self._written() or any((self.path / name).exists() for name in TRACES)):
                raise InputError(
                    f"{self.path} already holds a run; add resume=auto to go on with it, or choose another run_dir"
                )
            return None
        found = whole_checkpoints(self.checkpoints)
        if resume == "auto":
            if not found and (broken := self._written()):
                raise InputError(
                    f"resume=auto: every checkpoint in {self.checkpoints} is broken, the newest is {broken[-1].name}; "
                    "choose another run_dir, or delete them to start over"
                )
            if not found and self._lock:
                log.info("resume=auto: no checkpoint in %s, starting from the first step", self.checkpoints)
            return found[-1] if found else None
        if not is_whole(Path(resume)):
            raise InputError(f"resume={resume} is not a whole checkpoint; use a checkpoint's path, auto or never")
        if found and not found[-1].samefile(resume):
            raise InputError(
                f"{self.path} already holds a run that is past {resume}; choose another run_dir to go back to it"
            )
        return Path(resume)

    def _written(self) -> list[Path]:
        """Return all checkpoints, oldest first, whole or not."""
        return sorted(self.checkpoints.glob(CHECKPOINTS))

    def check_settings(self, settings: str, resume: str, free: tuple[str, ...]) -> None:
        """Raise InputError where the YAML `settings` of a resumed run differ from its config.yaml.

        Settings whose name begins with one of `free` may differ.
        """
        if resume == "never" or not self.config.exists():
            return
        before, now = (
            _flat(OmegaConf.to_container(c)) for c in (OmegaConf.load(self.config), OmegaConf.create(settings))
        )
        # The shallowest name first: a user sets rope.factor, not model.rope.factor.
        for key in sorted(before.keys() | now.keys(), key=lambda key: (key.count("."), key)):
            if not key.startswith(free) and before.get(key) != now.get(key):
                name = key.removesuffix("._target_")  # the class of a config group names the chosen file
                was, is_ = (v if name == key else str(v).rpartition(".")[2] for v in (before.get(key), now.get(key)))
                raise InputError(
                    f"resume={resume}: {name} was {was} when {self.path} began and is {is_} now; "
                    "keep it, or start another run_dir"
                )

    def acquire(self) -> None:
        """Create the folder and hold it. Raises InputError if it can't be written to, or another process holds it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise InputError(f"run_dir={self.path} can't be written to ({error.strerror}); choose another") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise InputError(f"another process is running in {self.path}; choose another run_dir") from error
        self._lock = lock  # held until this object is freed or the process ends in any way


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, child in node.items() for k, v in _flat(child, f"{prefix}.{key}" if prefix else key).items()}


def read_tracked(folder: Path) -> dict[str, Any]:
    """Return what W&B's logger wrote into a run's folder: id, group and url. Earlier versions wrote the id alone."""
    if (folder / TRACKED).is_file():
        tracked: dict[str, Any] = json.loads((folder / TRACKED).read_text())
        return tracked
    old = folder / "wandb_id.txt"
    return {"id": old.read_text().strip()} if old.is_file() else {}


def is_first_process() -> bool:
    """Return whether this process is the only one or the first of a launcher's.

    The others would find the files that the first one has just written.
    """
    return all(os.environ.get(rank, "0") == "0" for rank in RANKS)


def rank_files(checkpoint: Path) -> list[Path]:
    """Return the files that a checkpoint's ranks wrote, by rank."""
    return sorted(checkpoint.glob("rank-*-of-*.pt"))


def is_whole(checkpoint: Path) -> bool:
    """Return whether every rank's file is complete; torch's files are zip archives, with their directory at the end.

    The first process compares all bytes with their checksums. The other processes follow its choice and read only the
    directories.
    """
    ranks = rank_files(checkpoint)
    complete = ranks and [file.name for file in ranks] == [
        RANK_FILE.format(rank=rank, world_size=len(ranks)) for rank in range(len(ranks))
    ]
    if not complete:
        return False
    with ThreadPoolExecutor() as pool:  # threads help, because checksums are computed without the interpreter's lock
        return all(pool.map(_is_sound, [checkpoint / STATE_FILE, *ranks]))


def _is_sound(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return not is_first_process() or archive.testzip() is None
    except Exception:  # damaged bytes may look like an unknown compression, an encrypted file or an invalid date
        return False


def whole_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints in `folder`, oldest first; log a warning for each broken one."""
    found = []
    for path in sorted(folder.glob(CHECKPOINTS)):
        if is_whole(path):
            found.append(path)
        else:
            log.warning("%s is broken and skipped", path)
    return found


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a file of JSON lines, without a line that a crash cut off; empty if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


def write_aside(path: Path, text: str) -> None:
    """Write `text` to a file beside `path`, then rename it, so that `path` is never incomplete."""
    aside = path.with_suffix(".partial")
    aside.write_text(text)
    aside.replace(path)
