"""Read folders of text or code, one document per file."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

from lctrain.data.corpus import Corpus, Document
from lctrain.errors import InputError

logger = logging.getLogger(__name__)

DecodingErrors = Literal["strict", "skip", "replace"]


@dataclass(frozen=True, kw_only=True)
class FileCorpus(Corpus):
    """A corpus of the UTF-8 files under `path` (a file, or a folder searched with `patterns`, without hidden files).

    `errors` says what happens at an invalid byte: `strict` raises an InputError that names the file, `skip` leaves out
    the document and counts it, `replace` puts U+FFFD in the byte's place.
    """

    path: str
    patterns: Sequence[str] = ("**/*",)
    errors: DecodingErrors = "strict"

    def __post_init__(self) -> None:
        if self.errors not in get_args(DecodingErrors):
            raise InputError(f"errors={self.errors!r}: choose one of {', '.join(get_args(DecodingErrors))}")

    def files(self) -> Sequence[Path]:
        root = Path(self.path).expanduser()
        if root.is_file():
            return [root]
        if not root.is_dir():
            raise InputError(f"{root}: no such file or folder; set data.path")
        found = sorted({f for pattern in self.patterns for f in root.glob(pattern) if f.is_file()})
        found = [f for f in found if not any(p[0] == "." or p == "__pycache__" for p in f.relative_to(root).parts)]
        if not found:
            raise InputError(f"{root}: the corpus is empty, no file matches {', '.join(self.patterns)}")
        return found

    def name(self, file: Path) -> str:
        """Return the file's path relative to the corpus, which is the same on every machine."""
        root = Path(self.path).expanduser()
        return file.name if file == root else file.relative_to(root).as_posix()

    def open(self, file: Path) -> BinaryIO:
        """Open the file for reading bytes. Raises InputError if it cannot be read."""
        try:
            return file.open("rb")
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror})") from error

    def decode(self, raw: bytes, where: str) -> str | None:
        """Return `raw` as text, or None to skip it. Raises an InputError that names `where` if errors are strict."""
        try:
            return raw.decode("utf-8", "replace" if self.errors == "replace" else "strict")
        except UnicodeDecodeError as error:
            if self.errors == "skip":
                return None
            advice = "narrow data.patterns, or set data.errors to skip or replace"
            raise InputError(f"{where}: invalid UTF-8 at byte {error.start}; {advice}") from error


@dataclass(frozen=True, kw_only=True)
class TextCorpus(FileCorpus):
    """A corpus of a file or a folder of text or code, in which every file is a document."""

    def size_hint(self) -> int:
        return len(self.files())

    def documents(self) -> Iterator[Document]:
        num_skipped = 0
        for file in self.files():
            with self.open(file) as stream:
                text = self.decode(stream.read(), str(file))
            if text is None:
                num_skipped += 1
            else:
                yield Document(name=self.name(file), text=text)
        if num_skipped:
            logger.warning("skipped %d files under %s that are not UTF-8", num_skipped, self.path)
