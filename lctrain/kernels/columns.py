"""Define a sparse table that a pattern looks up: a few columns for each head and row.

Shape legend: H heads, M rows, R columns of a row.
"""

from typing import Any

import torch
from torch import Tensor

from lctrain.kernels.interval import Interval

MAX_ROWS = 8  # rows of an interval that are checked one by one; where there are more, any entry may be true


class Columns:
    """A boolean table [H, M, any number], given by the columns of its true entries, [H, M, R]; -1 is none.

    A look-up at positions gives truth values, one at intervals of positions gives their bounds. A row beyond the last
    is read as the last.
    """

    def __init__(self, columns_HMR: Tensor) -> None:
        self.columns_HMR = columns_HMR

    def hold(self, head: Any, row: Any, column: Any) -> Any:
        """Return whether `column` is one of the columns of `row`, for tensors that broadcast or for intervals."""
        if isinstance(row, Interval) or isinstance(column, Interval):
            return self._bounds(head, Interval.of(row), Interval.of(column))
        num_rows = self.columns_HMR.shape[1]
        row = torch.clamp(row, 0, num_rows - 1)
        found = self.columns_HMR[head, row, 0] == column
        for entry in range(1, self.columns_HMR.shape[2]):
            found = found | (self.columns_HMR[head, row, entry] == column)
        return found

    def _bounds(self, head: Any, row: Interval, column: Interval) -> Interval:
        num_rows = self.columns_HMR.shape[1]
        first, last, low, high = map(torch.as_tensor, (row.lo, row.hi, column.lo, column.hi))
        possibly = (last - first >= MAX_ROWS) & (low == low)
        for step in range(min(MAX_ROWS, num_rows)):
            columns = self.columns_HMR[head, (first + step).clamp(0, num_rows - 1).long()]
            for entry in columns.unbind(-1):
                possibly = possibly | ((first + step <= last) & (entry >= low) & (entry <= high))
        one = (first == last) & (low == high)  # where rows and columns are single, the entry is known
        return Interval(possibly & one, possibly)
