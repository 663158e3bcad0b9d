"""Tensors that are kept once and asked for again, and attention that is never computed twice.

A checkpointed layer (`torch.utils.checkpoint`, non-reentrant) keeps none of the tensors that autograd saves; the first
that is asked for makes the layer run again. Two things are better known than torch can know them: what attention
needs of its inputs, and that its output is worth more than it weighs.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lctrain.view import View


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


class AttentionCall:
    """One attention of a checkpointed layer, from its first run to its backward.

    Of what the kernel's backward needs, q, k and v come from the recomputed layer. The output and all else that the
    kernel made is kept here from the first run on (`keep`), or from the layer's recomputation on.
    """

    def __init__(self, keep: bool) -> None:
        self._fills = keep
        self._begun = False
        self._out: Tensor | None = None
        self.made: list[Tensor] = []

    def run(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """attend(q, k, v), computed only if its output is not here."""
        (q, k, v), recall = save(q, k, v)
        if self._out is None:
            hooks = _WithoutInputs((q, k, v), recall, self.made, self._fills)
            with saved_tensors_hooks(hooks.pack, hooks.unpack):
                out = attend(q, k, v)
            hooks.forget()
            self._out = out.detach() if self._fills else None
            self._fills = True
            if not self._begun:
                self._begun = True
                return out
        assert self._out is not None
        return self._out.detach().requires_grad_()  # whose graph nobody walks


class _WithoutInputs:
    """Hooks that keep no view of `inputs`, which `recall` gives, and put other tensors into `made`, if at all."""

    def __init__(self, inputs: tuple[Tensor, ...], recall: Recall, made: list[Tensor], fills: bool) -> None:
        self._inputs, self._recall, self._made, self._fills = inputs, recall, made, fills
        self._num_made = 0

    def pack(self, tensor: Tensor) -> Any:
        for index, given in enumerate(self._inputs):
            if view := View.of(tensor, given):
                return index, view
        if self._fills:
            self._made.append(tensor.detach())
        self._num_made += 1
        return self._num_made - 1

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, int):
            if packed >= len(self._made):
                self._recall()  # the layer runs again, and this attention in it
            return self._made[packed]
        index, view = packed
        taken: Tensor = view.take(self._recall()[index])
        return taken

    def forget(self) -> None:
        """Autograd holds on to hooks: these must not hold on to the inputs."""
        self._inputs = ()


_next_call: ContextVar[Callable[[], AttentionCall] | None] = ContextVar("next_call", default=None)


def attend_once(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """attend(q, k, v), whatever kernel runs; in a checkpointed layer it is the next `AttentionCall`."""
    next_call = _next_call.get()
    if next_call is None or not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, v)):
        return attend(q, k, v)
    return next_call().run(attend, q, k, v)


def recording(calls: list[AttentionCall], *, keep: bool) -> AbstractContextManager[None]:
    """A checkpointed layer's forward: its attentions are appended to `calls`."""
    return _calls_from(lambda: _appended(calls, AttentionCall(keep)))


def replaying(calls: list[AttentionCall]) -> AbstractContextManager[None]:
    """The same layer run again."""
    return _calls_from(iter(calls).__next__)


def noting(calls: list[AttentionCall]) -> AbstractContextManager[None]:
    """A part of a layer that is checkpointed by itself: its attentions are appended to `calls` too."""
    whole = _next_call.get() or (lambda: AttentionCall(keep=False))
    return _calls_from(lambda: _appended(calls, whole()))


@contextmanager
def _calls_from(source: Callable[[], AttentionCall]) -> Iterator[None]:
    token = _next_call.set(source)
    try:
        yield
    finally:
        _next_call.reset(token)


def _appended(calls: list[AttentionCall], call: AttentionCall) -> AttentionCall:
    calls.append(call)
    return call


def recomputed(run: Callable[[Tensor], Tensor], given: Tensor, again: Callable[[], Tensor]) -> Tensor:
    """run(given), of which nothing is kept; the backward runs it once more on what `again` gives.

    Inside a checkpointed layer, whose own recomputation it does not join.
    """
    first = [given]  # not an argument of the checkpoint, which would keep it
    calls: list[AttentionCall] = []

    def compute() -> Tensor:
        return run(first.pop() if first else again())

    with saved_tensors_hooks(_as_it_is, _as_it_is):  # what a checkpoint saves itself would count as the layer's
        return checkpoint(  # type: ignore[no-any-return]
            compute, use_reentrant=False, context_fn=lambda: (noting(calls), replaying(calls))
        )


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
