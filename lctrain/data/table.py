"""The tokenized corpus: an Arrow file, mapped into memory and read as numpy views."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lctrain.errors import InputError


class TokenTable:
    """A table of documents by number. Nothing is copied until a batch is filled."""

    def __init__(self, path: Path) -> None:
        """Map `path` into memory. Raises InputError if it is not a whole Arrow stream."""
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                self._table = stream.read_all()
        except pa.ArrowInvalid as error:
            raise InputError(f"{path}: not a token cache ({error}); delete it to have it made again") from error

    @cached_property
    def source_hash(self) -> npt.NDArray[np.float64]:
        """The hash of each document's source, in [0, 1)."""
        return np.asarray(self._table.column("source_hash"))

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens in each document."""
        return np.concatenate([np.diff(offsets) for offsets, _ in self._lists["input_ids"]]).astype(np.int64)

    def names(self) -> list[str]:
        """Return the documents' names."""
        return list(self._table.column("name").to_pylist())

    def tokens(self, document: int) -> npt.NDArray[np.int32]:
        """Return a read-only view of the document's tokens."""
        return self._view("input_ids", document)

    def loss_mask(self, document: int) -> npt.NDArray[np.int8] | None:
        """Return a mask that is 1 for each token to be predicted; None if all are."""
        return self._view("loss_mask", document) if self._has_mask[document] else None

    def _view(self, column: str, document: int) -> npt.NDArray[Any]:
        chunk = int(np.searchsorted(self._chunk_starts, document, side="right")) - 1
        row = document - int(self._chunk_starts[chunk])
        offsets, values = self._lists[column][chunk]
        return values[offsets[row] : offsets[row + 1]]

    @cached_property
    def _lists(self) -> dict[str, list[tuple[npt.NDArray[np.int32], npt.NDArray[Any]]]]:
        """The chunks of each list column, as the offsets at which lists begin, and their values."""
        columns = {name: self._table.column(name).chunks for name in ("input_ids", "loss_mask")}
        return {name: [(c.offsets.to_numpy(), c.values.to_numpy()) for c in chunks] for name, chunks in columns.items()}

    @cached_property
    def _chunk_starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(len(offsets) - 1 for offsets, _ in self._lists["input_ids"])])

    @cached_property
    def _has_mask(self) -> npt.NDArray[np.bool_]:
        return np.asarray(self._table.column("loss_mask").is_valid())
