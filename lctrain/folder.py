"""A run's folder: who holds it, what it holds."""

import fcntl
import logging
import zipfile
from pathlib import Path
from typing import IO

from lctrain.errors import InputError

log = logging.getLogger(__name__)


class RunFolder:
    """A run's folder, held by one process at a time."""

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
        """The checkpoint that `resume` (never, auto, or a path) means; broken ones are skipped with a warning."""
        found = whole_checkpoints(self.checkpoints)
        if resume == "never":
            if found:
                raise InputError(
                    f"{self.path} already holds a run; add resume=auto to go on with it, or choose another run_dir"
                )
            return None
        if resume == "auto":
            return found[-1] if found else None
        if not Path(resume).is_file() or not is_whole(Path(resume)):
            raise InputError(f"resume={resume} is not a whole checkpoint; use a checkpoint's path, auto or never")
        if found and not found[-1].samefile(resume):
            raise InputError(
                f"{self.path} already holds a run that is past {resume}; choose another run_dir to go back to it"
            )
        return Path(resume)

    def acquire(self) -> None:
        """Create the folder and hold it; InputError while another process does."""
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
        self._lock = lock  # held until this process ends, however it ends


def is_whole(path: Path) -> bool:
    """Whether every byte that was written is there: torch's files are zip archives with checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # damaged bytes look like anything: another compression, an encrypted file, a date that is none
        return False


def whole_checkpoints(folder: Path) -> list[Path]:
    """Oldest to newest."""
    found = []
    for path in sorted(folder.glob("step-*.ckpt")):
        if is_whole(path):
            found.append(path)
        else:
            log.warning("%s is broken and skipped", path)
    return found
