"""Count, select and reset all tensors that an object holds for the rows of a batch."""

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, Self

from torch import Tensor


class State:
    """An object whose tensors all begin with the rows of the batch, [B, …].

    Its tensors are the attributes that are tensors, and those in attributes that are lists, tuples, dicts or states.
    """

    def tensors(self) -> list[Tensor]:
        """Return every tensor. Raises ValueError where one does not begin with as many rows as the others."""
        found = list(_tensors(self))
        num_rows = {tensor.shape[0] if tensor.ndim else None for tensor in found}
        if len(num_rows) > 1 or None in num_rows:
            shapes = ", ".join(str([*tensor.shape]) for tensor in found)
            raise ValueError(f"{type(self).__name__} holds tensors that don't all begin with the batch: {shapes}")
        return found

    @property
    def num_rows(self) -> int | None:
        """Return the number of rows of the batch; None where there is no tensor yet."""
        tensors = self.tensors()
        return tensors[0].shape[0] if tensors else None

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the storages of all tensors."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors())

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        if self.tensors():
            self.become(_changed(self, lambda tensor: tensor[rows.to(tensor.device)]))

    def twin(self) -> Self:
        """Return a copy in the same state, independent of this object."""
        twin: Self = _changed(self, lambda tensor: tensor.clone())
        return twin

    def become(self, other: Self) -> None:
        """Replace this object's attributes by those of `other`."""
        vars(self).clear()
        vars(self).update(vars(other))


def _tensors(value: Any) -> Iterator[Tensor]:
    inside: Any = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        inside = value
    elif isinstance(value, dict | State):
        inside = (value if isinstance(value, dict) else vars(value)).values()
    for item in inside:
        yield from _tensors(item)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with every tensor changed; lists, tuples, dicts and states are copied, all else is shared."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        items = [_changed(item, change) for item in value]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if isinstance(value, dict | State):
        twin = copy(value)
        content = twin if isinstance(twin, dict) else vars(twin)
        content.update({name: _changed(item, change) for name, item in content.items()})
        return twin
    return value
