"""Read records with named fields, and make corpora of them."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lctrain.data.corpus import Corpus, Document
from lctrain.data.text import FileCorpus
from lctrain.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RowCorpus(Corpus, ABC):
    """A corpus of records. One subclass reads records, another makes documents of them; a third inherits from both."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield pairs of a name, which tells where the record comes from, and the record."""


def field(name: str, row: dict[str, Any], key: str) -> Any:
    """Return `row[key]`; raise an InputError with the record's `name` if it has no such field."""
    if key not in row:
        raise InputError(f"{name}: no field {key!r}; it has {', '.join(map(repr, row)) or 'none'}")
    return row[key]


@dataclass(frozen=True, kw_only=True)
class TextRows(RowCorpus):
    """A corpus in which the `text_field` of every record is a document."""

    text_field: str

    def documents(self) -> Iterator[Document]:
        for name, row in self.rows():
            text = field(name, row, self.text_field)
            if not isinstance(text, str):
                raise InputError(f"{name}: {self.text_field!r} is {type(text).__name__}, not text")
            yield Document(name=name, text=text)


@dataclass(frozen=True, kw_only=True)
class JsonlRows(RowCorpus, FileCorpus):
    """A corpus whose records are the lines of a JSONL file or of a folder of such files; blank lines are skipped."""

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        num_skipped = 0
        for file in self.files():
            with self.open(file) as stream:
                for number, raw in enumerate(stream, start=1):
                    line = self.decode(raw, f"{file}:{number}")
                    if line is None:
                        num_skipped += 1
                    elif line.strip():
                        yield f"{self.name(file)}:{number}", parse(line, f"{file}:{number}")
        if num_skipped:
            logger.warning("skipped %d lines under %s that are not UTF-8", num_skipped, self.path)


def parse(line: str, where: str) -> dict[str, Any]:
    """Return the JSON object in `line`; raise an InputError that names `where` if it holds none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at character {error.pos + 1})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {type(row).__name__}, expected an object")
    return row


@dataclass(frozen=True, kw_only=True)
class JsonlCorpus(JsonlRows, TextRows):
    """A corpus of the texts in one field of JSONL records."""
