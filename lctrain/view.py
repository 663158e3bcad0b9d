"""Describe a tensor that autograd saves as a view of another tensor that is kept anyway."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class View(NamedTuple):
    """The shape, strides and offset of a view; the offset is relative to the first number of the kept tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor, kept: Tensor) -> Self | None:
        """Return `tensor` as a view of `kept`; None where they share no memory."""
        if tensor.untyped_storage()._cdata != kept.untyped_storage()._cdata:
            return None
        return cls(tensor.shape, tuple(tensor.stride()), int(tensor.storage_offset() - kept.storage_offset()))

    def take(self, kept: Tensor) -> Tensor:
        """Return this view of `kept`, which may be another tensor with the same layout."""
        return kept.as_strided(self.shape, self.stride, kept.storage_offset() + self.offset)
