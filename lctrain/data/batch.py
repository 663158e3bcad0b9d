"""Fill rows of document fragments into tensors."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from lctrain.data.packing import Row
from lctrain.data.table import TokenTable

# input_ids, labels, position_ids: int64 [rows, length]; num_tokens (without padding), num_valid_tokens,
# sequence_length (of the whole row, of which a rank may hold a part): int
Batch: TypeAlias = dict[str, Any]

IGNORED = -100


def fill(rows: Sequence[Row], length: int, table: TokenTable, pad_token_id: int) -> Batch:
    """Return the rows' ids, labels and positions, each int64 [rows, length], and the number of their tokens.

    A label is the token that follows in the same document, even if the row ends before that token. Positions restart at
    0 with each fragment and with the padding, and nothing else marks the documents of a row.
    """
    shape = (len(rows), length)
    input_ids, labels = np.full(shape, pad_token_id), np.full(shape, IGNORED)
    position_ids = np.empty(shape, dtype=np.int64)
    num_tokens = 0
    for r, row in enumerate(rows):
        at = 0
        for document, first, stop in row:
            tokens, mask = table.tokens(document), table.loss_mask(document)
            end, following = at + stop - first, tokens[first + 1 : stop + 1]
            if mask is not None:
                following = np.where(mask[first + 1 : stop + 1], following, IGNORED)
            input_ids[r, at:end] = tokens[first:stop]
            labels[r, at : at + len(following)] = following
            position_ids[r, at:end] = np.arange(end - at)
            at = end
        position_ids[r, at:] = np.arange(length - at)
        num_tokens += at
    arrays = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"num_tokens": num_tokens}
