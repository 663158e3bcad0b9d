"""What autograd saves, told as a view of a tensor that is kept anyway."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class View(NamedTuple):
    """Where the numbers lie, from the first of the tensor that is kept."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor, kept: Tensor) -> Self | None:
        """None where they share no memory."""
        if tensor.untyped_storage()._cdata != kept.untyped_storage()._cdata:
            return None
        return cls(tensor.shape, tuple(tensor.stride()), int(tensor.storage_offset() - kept.storage_offset()))

    def take(self, kept: Tensor) -> Tensor:
        """The view of `kept`, or of a tensor like it."""
        return kept.as_strided(self.shape, self.stride, kept.storage_offset() + self.offset)
