"""Pack documents into rows. A micro-batch is a pure function of the corpus, the seed, the step and its index in the
step.

So resuming needs only the step, and any split of a step over ranks and accumulation gives the same tokens.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lctrain.data.curriculum import Curriculum
from lctrain.errors import InputError

logger = logging.getLogger(__name__)

Fragment: TypeAlias = tuple[int, int, int]  # a document's number, its first token here, one past its last token here
Row: TypeAlias = list[Fragment]
Ints: TypeAlias = npt.NDArray[np.int64]


def cut(documents: Ints, ends: Ints, begin: int, stop: int) -> Row:
    """Return tokens `begin` to `stop` of the concatenated `documents`; `ends` is the running total of their tokens."""
    row = []
    for i in range(int(np.searchsorted(ends, begin, side="right")), len(ends)):
        start = int(ends[i - 1]) if i else 0
        if start >= stop:
            break
        row.append((int(documents[i]), max(begin - start, 0), min(int(ends[i]), stop) - start))
    return row


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing(ABC):
    """A way to make the rows of each micro-batch of a step.

    documents: the numbers of the documents to train on. lengths: the tokens in each document of the corpus.
    num_micro_batches: the micro-batches in an optimizer step, over all ranks.
    """

    documents: Ints
    lengths: Ints
    curriculum: Curriculum
    micro_batch_tokens: int
    num_micro_batches: int
    seed: int

    @abstractmethod
    def rows(self, step: int, index: int) -> list[Row]:
        """Return the rows of micro-batch `index` (over all ranks) of `step`, at most `micro_batch_tokens` tokens."""

    def length_at(self, step: int) -> int:
        """Return the number of tokens in a row at `step`."""
        return self.curriculum.length_at(step, self.micro_batch_tokens * self.num_micro_batches)

    @cached_property
    def epoch(self) -> Callable[[int], tuple[Ints, Ints]]:
        """A function from an epoch to its order of documents and the running total of their tokens.

        It caches two epochs, because a row can contain tokens of two.
        """
        return lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> tuple[Ints, Ints]:
        order = np.random.default_rng((self.seed, epoch)).permutation(self.documents)
        return order, np.cumsum(self.lengths[order])


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamPacking(Packing):
    """A packing of the shuffled documents as one endless stream, cut into rows, so that no token is lost."""

    def rows(self, step: int, index: int) -> list[Row]:
        begin = (step * self.num_micro_batches + index) * self.micro_batch_tokens
        end, length = begin + self.micro_batch_tokens, self.length_at(step)
        return [self._row(start, min(start + length, end)) for start in range(begin, end, length)]

    def _row(self, begin: int, stop: int) -> Row:
        row: Row = []
        while begin < stop:
            epoch, offset = divmod(begin, self._epoch_tokens)
            until = min(self._epoch_tokens, offset + stop - begin)
            row += cut(*self.epoch(epoch), offset, until)
            begin += until - offset
        return row

    @cached_property
    def _epoch_tokens(self) -> int:
        return int(self.lengths[self.documents].sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class WholePacking(Packing):
    """A packing of whole, shuffled documents: each joins the current row if it fits, else the next row where it does
    (next-fit).

    A document longer than the row is dropped at that row length, and the log says how many are. The document at which a
    step starts depends on earlier steps, so these are replayed, over lengths only (about a microsecond per document).
    """

    def __post_init__(self) -> None:
        for length in self.curriculum.lengths():
            dropped = self.num_dropped(length)
            if dropped == len(self.documents):
                raise InputError(f"every document is longer than {length} tokens; use packing=stream or longer rows")
            logger.info("rows of %d tokens drop %d of %d documents", length, dropped, len(self.documents))

    def num_dropped(self, length: int) -> int:
        """Return how many documents are too long for a row of `length`."""
        return int((self.lengths[self.documents] > length).sum())

    def rows(self, step: int, index: int) -> list[Row]:
        for earlier in range(len(self._starts) - 1, step):
            self._starts.append(self._pack(earlier)[1])
        num_rows = -(-self.micro_batch_tokens // self.length_at(step))
        return self._packed(step)[0][index * num_rows : (index + 1) * num_rows]

    @cached_property
    def _starts(self) -> list[int]:
        """The number of documents passed before each step, for the steps packed so far and the next."""
        return [0]

    @cached_property
    def _packed(self) -> Callable[[int], tuple[list[Row], int]]:
        return lru_cache(maxsize=1)(self._pack)

    def _pack(self, step: int) -> tuple[list[Row], int]:
        """Return the rows of the whole step, and the number of documents passed after it."""
        rooms = self._rooms(self.length_at(step))
        rows: list[Row] = [[] for _ in rooms]
        longest, at, number = max(rooms), 0, self._starts[step]
        while True:
            epoch, i = divmod(number, len(self.documents))
            document = int(self.epoch(epoch)[0][i])
            size = int(self.lengths[document])
            if size <= longest:
                at = next((row for row in range(at, len(rooms)) if rooms[row] >= size), len(rooms))
                if at == len(rooms):
                    return rows, number
                rows[at].append((document, 0, size))
                rooms[at] -= size
            number += 1

    def _rooms(self, length: int) -> list[int]:
        """Return the tokens that each row of a step can take; a micro-batch's last row takes the remainder."""
        full, rest = divmod(self.micro_batch_tokens, length)
        return ([length] * full + [rest] * (rest > 0)) * self.num_micro_batches


PACKINGS: dict[str, type[Packing]] = {"stream": StreamPacking, "whole": WholePacking}
