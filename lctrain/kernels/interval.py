"""Interval arithmetic: what a mask function says of a block of queries and keys, without looking at each pair."""

import operator
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, SupportsIndex

import torch
from torch import Tensor

Bound = Tensor | int | bool


class Interval:
    """Every value from `lo` to `hi`, both included; elementwise over tensors that broadcast.

    The same operators that a mask function applies to indices give bounds of its result here. Of truth values False is
    less than True: `lo` means surely, `hi` possibly. Bounds are exact as long as no operand occurs twice; where one
    does, they are wider and never wrong. What has no bounds here (other functions, Python's `if` and `and`, looking up
    a table at an index) raises TypeError.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, lo: Bound, hi: Bound) -> None:
        self.lo, self.hi = lo, hi

    @classmethod
    def of(cls, value: Any) -> "Interval":
        """A value known exactly."""
        return value if isinstance(value, Interval) else cls(value, value)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """A tensor on the left of an operator; torch turns NotImplemented into a TypeError."""
        operation = getattr(operator, func.__name__, None)
        return NotImplemented if operation is None or kwargs else operation(*map(Interval.of, args))

    def __bool__(self) -> bool:
        raise TypeError("an interval is neither true nor false")

    def __neg__(self) -> "Interval":
        return Interval(-self.hi, -self.lo)

    def __add__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        return Interval(self.lo + other.lo, self.hi + other.hi)

    def __sub__(self, other: Any) -> "Interval":
        return self.__add__(-Interval.of(other))

    def __rsub__(self, other: Any) -> "Interval":
        return (-self).__add__(other)

    def __mul__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        products = [torch.as_tensor(a * b) for a in (self.lo, self.hi) for b in (other.lo, other.hi)]
        lows, highs = (fold(*products[:2]) for fold in (torch.minimum, torch.maximum))
        return Interval(
            torch.minimum(lows, torch.minimum(*products[2:])), torch.maximum(highs, torch.maximum(*products[2:]))
        )

    def __floordiv__(self, divisor: SupportsIndex) -> "Interval":
        n = _positive(divisor)
        return Interval(self.lo // n, self.hi // n)

    def __mod__(self, divisor: SupportsIndex) -> "Interval":
        n = _positive(divisor)
        wraps = torch.as_tensor(self.lo // n != self.hi // n)
        return Interval(torch.where(wraps, 0, self.lo % n), torch.where(wraps, n - 1, self.hi % n))

    def __lt__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        return Interval(self.hi < other.lo, self.lo < other.hi)

    def __le__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        return Interval(self.hi <= other.lo, self.lo <= other.hi)

    def __gt__(self, other: Any) -> "Interval":
        return Interval.of(other) < self

    def __ge__(self, other: Any) -> "Interval":
        return Interval.of(other) <= self

    def __eq__(self, other: Any) -> "Interval":  # type: ignore[override]
        other = Interval.of(other)
        return Interval(
            (self.lo == other.hi) & (self.hi == other.lo),  # one value each, and the same
            (self.lo <= other.hi) & (other.lo <= self.hi),
        )

    def __ne__(self, other: Any) -> "Interval":  # type: ignore[override]
        return self.__eq__(other).__invert__()

    def __invert__(self) -> "Interval":
        return Interval(~_truth(self.hi), ~_truth(self.lo))

    def __and__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        return Interval(_truth(self.lo) & _truth(other.lo), _truth(self.hi) & _truth(other.hi))

    def __or__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        return Interval(_truth(self.lo) | _truth(other.lo), _truth(self.hi) | _truth(other.hi))

    __radd__, __rmul__, __rand__, __ror__ = __add__, __mul__, __and__, __or__

    # What transformers' `and_masks` asks of an index and of a mask.

    @property
    def device(self) -> torch.device:
        return torch.as_tensor(self.lo).device

    def to(self, device: torch.device) -> "Interval":
        return self

    def new_ones(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.ones(size, dtype=dtype, device=self.device)


class Blocks(Interval):
    """The indices of some blocks: block i of `size` holds indices i·size to (i + 1)·size - 1, below `length`.

    `axis` is -2 for queries, -1 for keys, in a mask of [B, H, L, S].
    """

    def __init__(self, numbers: Tensor, *, size: int, length: int, axis: int) -> None:
        self.numbers, self.size, self.length, self.axis = numbers, size, length, axis
        self.part: Tensor | None = None
        first = (numbers.to(torch.int32) * size)[None]
        super().__init__(*self._shaped(first, (first + size).clamp(max=length) - 1))

    def whole(self) -> Tensor:
        """Whether a block is filled: the last one may end before its size."""
        filled: Tensor = torch.as_tensor(self.lo) + self.size <= self.length
        return filled

    def look_up(self, table_RS: Tensor) -> Interval:
        """Bounds of the entries at each block, [R, 1, L, 1] or [R, 1, 1, S]; of an empty part, none fits between."""
        entries = self._entries(table_RS)
        if self.part is None:
            return Interval(*self._shaped(*entries.aminmax(dim=-1)))
        limits = torch.iinfo(entries.dtype)
        low, high = entries.where(self.part, limits.max).amin(-1), entries.where(self.part, limits.min).amax(-1)
        return Interval(*self._shaped(low, high))

    def mixed(self, documents_RS: Tensor) -> Tensor:
        """The numbers of the blocks that hold more than one document, in any row."""
        entries = self._entries(documents_RS)
        return self.numbers[(entries != entries[..., :1]).any(-1).any(0)]

    def parts(self, documents_RS: Tensor) -> "Blocks":
        """Three of each block, of its tokens in its first document, in its last, and between.

        Stacked in front, [3, 1, R, 1, L, 1] for queries and [1, 3, R, 1, 1, S] for keys, so that every part meets
        every other.
        """
        entries = self._entries(documents_RS)
        first, last = entries == entries[..., :1], entries == entries[..., -1:]
        parts = copy(self)
        parts.part = torch.stack((first, last, ~(first | last)))
        index = torch.arange(self.size, dtype=torch.int32, device=entries.device).expand(parts.part.shape)
        low, high = parts._shaped(index.where(parts.part, self.size).amin(-1), index.where(parts.part, -1).amax(-1))
        parts.lo, parts.hi = self.lo + low, torch.minimum(self.lo + high, torch.as_tensor(self.hi))
        return parts

    def _entries(self, table_RS: Tensor) -> Tensor:
        """[R, blocks, size]; the last entry stands for those that are missing."""
        table_RS = table_RS[:, : self.length]
        table_RS = torch.cat((table_RS, table_RS[:, -1:].expand(-1, -self.length % self.size)), dim=1)
        entries: Tensor = table_RS.unflatten(1, (-1, self.size))[:, self.numbers]
        return entries

    def _shaped(self, *of_blocks: Tensor) -> list[Tensor]:
        """[R, blocks] as in a mask, [3, R, blocks] as in `parts`."""
        if self.axis == -1:
            return [x[:, None, None] if x.ndim == 2 else x[None, :, :, None, None] for x in of_blocks]
        return [x[:, None, :, None] if x.ndim == 2 else x[:, None, :, None, :, None] for x in of_blocks]


def _positive(divisor: Any) -> int:
    if not isinstance(divisor, int) or divisor < 1:
        raise TypeError("an interval is divided by positive integers only")
    return divisor


def _truth(bound: Bound) -> Tensor:
    bound = torch.as_tensor(bound)
    if bound.dtype != torch.bool:
        raise TypeError("bits of integers have no bounds")
    return bound
