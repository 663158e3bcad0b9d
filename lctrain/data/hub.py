"""Read what the `datasets` library can read: a name on the Hugging Face hub, or a local folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from lctrain.data.rows import RowCorpus, TextRows
from lctrain.errors import InputError


@dataclass(frozen=True, kw_only=True)
class HubRows(RowCorpus):
    """A corpus of the records in one split of the dataset `name`: a hub name, or a folder that holds data files or was
    written by `save_to_disk`.

    `config`, `data_dir` and `revision` choose a part or version of the dataset. Reading stops after `max_documents`
    records (null: all); with `streaming`, only the records that are read are downloaded.
    """

    name: str
    config: str | None
    data_dir: str | None
    revision: str | None
    split: str
    streaming: bool
    max_documents: int | None

    def __post_init__(self) -> None:
        if self.max_documents is not None and self.max_documents < 1:
            raise InputError(f"max_documents={self.max_documents} must be at least 1, or null for all")

    def files(self) -> Sequence[Path]:
        folder = Path(self.name).expanduser()
        return sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else ()

    def size_hint(self) -> int | None:
        return self.max_documents

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        rows, number = self._open(), 0
        try:
            for row in islice(rows, self.max_documents):
                yield f"{Path(self.name).name}/{self.config or 'default'}/{self.split}/{number}", row
                number += 1
        except Exception as error:  # the libraries that `datasets` uses for networks and formats raise their own errors
            raise InputError(f"dataset {self.name!r}, split {self.split!r}, row {number}: {_reason(error)}") from error

    def _open(self) -> Any:
        folder = Path(self.name).expanduser()
        try:
            if any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
                saved = datasets.load_from_disk(folder)
                return saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved
            return datasets.load_dataset(
                str(folder) if folder.is_dir() else self.name,
                self.config,
                data_dir=self.data_dir,
                revision=self.revision,
                split=self.split,
                streaming=self.streaming,
            )
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            message = f"dataset {self.name!r}, split {self.split!r}, cannot be opened: {_reason(error)}"
            raise InputError(message) from error


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


@dataclass(frozen=True, kw_only=True)
class HubCorpus(HubRows, TextRows):
    """A corpus of the texts in one column of a dataset."""
