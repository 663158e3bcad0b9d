"""Give saved tensors back in the backward, and never compute an attention twice in a checkpointed layer.

A checkpointed layer (`torch.utils.checkpoint`, non-reentrant) keeps none of the tensors that autograd saves; the first
one that the backward asks for makes the layer run again. Two facts that torch does not know save memory and time here:
attention's backward needs q, k and v, which the recomputed layer has anyway, and its output costs more to compute
again than to keep.
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
    """The identity on tensors, which it saves before anything is computed from them."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class Recall:
    """A function that returns saved tensors in the backward, as kept by autograd or computed again by a checkpoint."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._tensors: tuple[Tensor, ...] = ()

    def __call__(self) -> tuple[Tensor, ...]:
        if not self._tensors:  # a checkpoint returns each saved tensor only once
            self._tensors = self._node.saved_tensors
        return self._tensors


def save(*tensors: Tensor) -> tuple[tuple[Tensor, ...], Recall]:
    """Return the same tensors, and a function that returns them again in the backward. One must require grad."""
    saved: tuple[Tensor, ...] = _Save.apply(*tensors)  # type: ignore[no-untyped-call]
    return saved, Recall(saved[0].grad_fn)


class AttentionCall:
    """One attention of a checkpointed layer, from its first run to its backward.

    The kernel's backward gets q, k and v from the recomputed layer. The output and all other tensors that the kernel
    made are kept here from the first run on (`keep`), or else from the layer's recomputation on.
    """

    def __init__(self, keep: bool) -> None:
        self._fills = keep
        self._begun = False
        self._out: Tensor | None = None
        self.made: list[Tensor] = []

    def run(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attend(q, k, v), which is computed only if its output is not kept here."""
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
        return self._out.detach().requires_grad_()  # without a graph: the backward runs through that of the first run


class _WithoutInputs:
    """Saved-tensor hooks that keep no view of `inputs`, which `recall` returns; if `fills`, `made` gets the others."""

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
                self._recall()  # makes the layer run again with this attention, which fills `made`
            return self._made[packed]
        index, view = packed
        taken: Tensor = view.take(self._recall()[index])
        return taken

    def forget(self) -> None:
        """Drop the inputs: autograd keeps the hooks alive, and these would keep the inputs alive."""
        self._inputs = ()


_next_call: ContextVar[Callable[[], AttentionCall] | None] = ContextVar("next_call", default=None)


def attend_once(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attend(q, k, v), with any kernel; in a checkpointed layer, as the next `AttentionCall`."""
    next_call = _next_call.get()
    if next_call is None or not torch.is_grad_enabled() or not any(x.requires_grad for x in (q, k, v)):
        return attend(q, k, v)
    return next_call().run(attend, q, k, v)


def recording(calls: list[AttentionCall], *, keep: bool) -> AbstractContextManager[None]:
    """Return the context of a checkpointed layer's forward, which appends the layer's attentions to `calls`."""
    return _calls_from(lambda: _appended(calls, AttentionCall(keep)))


def replaying(calls: list[AttentionCall]) -> AbstractContextManager[None]:
    """Return the context of the same layer's recomputation, which takes its attentions from `calls`."""
    return _calls_from(iter(calls).__next__)


def noting(calls: list[AttentionCall]) -> AbstractContextManager[None]:
    """Return the context for a part of a layer that is checkpointed by itself: `calls` gets its attentions too."""
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
    """Return run(given) without keeping any of its tensors; the backward runs it once more on the tensor from `again`.

    Inside a checkpointed layer, the layer's own recomputation does not recompute it.
    """
    first = [given]  # in a list, because the checkpoint keeps its arguments
    calls: list[AttentionCall] = []

    def compute() -> Tensor:
        return run(first.pop() if first else again())

    with saved_tensors_hooks(_as_it_is, _as_it_is):  # hides what this checkpoint saves from the layer's checkpoint
        return checkpoint(  # type: ignore[no-any-return]
            compute, use_reentrant=False, context_fn=lambda: (noting(calls), replaying(calls))
        )


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
