"""What a corpus is: named documents, read one after the other, and a fingerprint that changes when they do."""

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

    Of a text with `answers`, pairs of a first character and one past the last, only these are to be predicted.
    `name` decides whether the document is held out, so it must not depend on the machine. What follows a `#` in it
    names a variant: all variants of one source stay on the same side of the split.
    """

    name: str
    text: str = ""
    messages: Sequence[Message] = ()
    answers: Sequence[tuple[int, int]] = ()

    @property
    def source(self) -> str:
        """The name without its variant."""
        return self.name.partition("#")[0]


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """Documents from one place. The fields are the settings; reading happens only in `documents`."""

    def __post_init__(self) -> None:  # noqa: B027  # most have nothing to refuse
        """Refuses settings that cannot work; reads nothing."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Reads every document once, always in the same order; InputError names what cannot be used."""

    def files(self) -> Sequence[Path]:
        """The local files the documents come from; InputError where there are none."""
        return ()

    def size_hint(self) -> int | None:
        """How many documents to expect, for progress only; None where counting would mean reading."""
        return None

    def fingerprint(self) -> str:
        """A digest of the settings and of each file's name, size and time of change; reads no document."""
        digest = hashlib.sha256(repr(self).encode())
        for file in self.files():
            stat = file.stat()
            digest.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()
