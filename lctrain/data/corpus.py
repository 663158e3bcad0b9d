"""Define a corpus: named documents, read one after the other, and a fingerprint that changes when the documents do."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Message: TypeAlias = dict[str, str]  # role and content, as chat templates take them


@dataclass(frozen=True, kw_only=True)
class Document:
    """A piece of text, or a conversation where `messages` is given.

    If a text has `answers`, pairs of a first character and one past the last, only these characters are predicted.
    `name` decides whether the document is held out, so it must not depend on the machine. The part of the name after
    `#` is a variant: all variants of one source stay on the same side of the split.
    """

    name: str
    text: str = ""
    messages: Sequence[Message] = ()
    answers: Sequence[tuple[int, int]] = ()

    @property
    def source(self) -> str:
        """Return the name without its variant."""
        return self.name.partition("#")[0]


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """A source of documents. The fields are the settings; only `documents` reads."""

    def __post_init__(self) -> None:  # noqa: B027  # most have nothing to refuse
        """Refuse settings that cannot work, without reading anything."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Read every document once, always in the same order. Raises an InputError that names what cannot be used."""

    def files(self) -> Sequence[Path]:
        """Return the local files that the documents come from; raise InputError if expected files are missing."""
        return ()

    def size_hint(self) -> int | None:
        """Return how many documents to expect, only to show progress; None if counting would mean reading."""
        return None

    def fingerprint(self) -> str:
        """Return a digest of the settings and of each file's path, size and time of change; read no document."""
        digest = hashlib.sha256(repr(self).encode())
        for file in self.files():
            stat = file.stat()
            digest.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()
