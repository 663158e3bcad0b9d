"""Tensors that are kept once and asked for again, and attention that is never computed twice.

A checkpointed layer (`torch.utils.checkpoint`, non-reentrant) keeps none of the tensors that autograd saves; the first
that is asked for makes the layer run again. Two things are better known than torch can know them: what attention
needs of its inputs, and that its output is worth more than it weighs.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Outputs = deque[Tensor]
_outputs: ContextVar[tuple[Outputs, bool] | None] = ContextVar("outputs", default=None)


class _Save(torch.autograd.Function):
    """The identity, which saves its inputs before anything is computed from them."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class Recall:
    """Gives saved tensors back in the backward: as autograd kept them, or computed again by a checkpoint."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._tensors: tuple[Tensor, ...] = ()

    def __call__(self) -> tuple[Tensor, ...]:
        if not self._tensors:  # a checkpoint gives each tensor once
            self._tensors = self._node.saved_tensors
        return self._tensors


def save(*tensors: Tensor) -> tuple[tuple[Tensor, ...], Recall]:
    """The same tensors, and how to have them again in the backward. One of them must require grad."""
    saved: tuple[Tensor, ...] = _Save.apply(*tensors)  # type: ignore[no-untyped-call]
    return saved, Recall(saved[0].grad_fn)


@contextmanager
def recording(outputs: Outputs) -> Iterator[None]:
    """A checkpointed layer's forward: `attend_once` leaves its outputs here."""
    token = _outputs.set((outputs, False))
    try:
        yield
    finally:
        _outputs.reset(token)


@contextmanager
def replaying(outputs: Outputs) -> Iterator[None]:
    """The same layer run again: `attend_once` takes its outputs from here and computes nothing."""
    token = _outputs.set((outputs, True))
    try:
        yield
    finally:
        _outputs.reset(token)


def attend_once(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """attend(q, k, v), which a recomputation of the layer does not run again.

    Whatever kernel runs: of what its backward needs, the output and all else it made are kept; q, k and v are not,
    they come from the recomputed layer. Outside of `recording` this is attend(q, k, v).
    """
    current = _outputs.get()
    if current is None or not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, v)):
        return attend(q, k, v)
    outputs, again = current
    (q, k, v), recall = save(q, k, v)
    if again:
        return outputs.popleft().requires_grad_()
    hooks = _KeptOutside((q, k, v), recall)
    with saved_tensors_hooks(hooks.pack, hooks.unpack):
        out = attend(q, k, v)
    hooks.forget()
    outputs.append(out.detach())
    return out


class _KeptOutside:
    """Hooks that keep every tensor but views of `inputs`, which `recall` gives."""

    def __init__(self, inputs: tuple[Tensor, ...], recall: Recall) -> None:
        self._inputs, self._recall = inputs, recall

    def pack(self, tensor: Tensor) -> Any:
        for index, given in enumerate(self._inputs):
            if tensor.untyped_storage()._cdata == given.untyped_storage()._cdata:
                return index, tensor.shape, tensor.stride(), tensor.storage_offset() - given.storage_offset()
        return tensor

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        index, shape, stride, offset = packed
        given: Tensor = self._recall()[index]
        return given.as_strided(shape, stride, given.storage_offset() + offset)

    def forget(self) -> None:
        """Autograd holds on to hooks: these must not hold on to the inputs."""
        self._inputs = ()
