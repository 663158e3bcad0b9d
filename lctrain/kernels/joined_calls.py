"""Attend with the heads of a layer in several calls, while autograd saves no more than for one call.

The backward of a call needs its output, and the next operation saves the joined outputs, which would be twice the
bytes. So the calls get their own graph here, in which each output is a slice of the joined one.

Shape legend: B rows, H heads of all calls, h of one of them, K key-value heads, L queries, S keys, D head dim.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from lctrain.view import View

Calls = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]


def joined_calls(calls: Calls, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
    """Return the outputs [B, h, L, D] of `calls` joined to [B, H, L, D].

    Each must be laid out in memory as [B, L, h, D], and the result is laid out as [B, L, H, D].
    """
    inputs = (q_BHLD, k_BKSD, v_BKSD)
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
        return _join(calls(*inputs))
    joined: Tensor = _JoinedCalls.apply(calls, *inputs)  # type: ignore[no-untyped-call]
    return joined


def _join(outs: Sequence[Tensor]) -> Tensor:
    return torch.cat([out_BhLD.transpose(1, 2) for out_BhLD in outs], dim=2).transpose(1, 2)


class _Inputs(torch.autograd.Function):
    """The start of the calls' own graph, which holds no inputs."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise AssertionError("gradients are taken before this")


class _JoinedCalls(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, calls: Calls, *inputs: Tensor) -> Tensor:
        saved, views, recalled = list[Tensor](), list[tuple[int, View]](), list[Tensor]()

        def pack(tensor: Tensor) -> int:
            saved.append(tensor)
            return len(saved) - 1

        def unpack(index: int) -> Tensor:
            kept, view = views[index]
            return view.take(recalled[kept])

        with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
            own = _Inputs.apply(inputs[0].new_empty(0).requires_grad_(), *inputs)  # type: ignore[no-untyped-call]
            outs = calls(*own)
        assert all(out_BhLD.transpose(1, 2).is_contiguous() for out_BhLD in outs), "not laid out by token"
        joined = _join([out.detach() for out in outs])
        kept = [*inputs, joined]
        for tensor in saved:
            view = _slice_of_joined(tensor, outs, joined)
            views.append((len(inputs), view) if view else _place(tensor, kept))
        saved.clear()  # the hooks hold this list, and would keep its tensors alive
        ctx.save_for_backward(*kept)
        ctx.recalled = recalled
        ctx.num_heads = [out.shape[1] for out in outs]
        ctx.ends, ctx.begins = ([get_gradient_edge(x) for x in tensors] for tensors in (outs, own))
        return joined

    @staticmethod
    def backward(ctx: Any, d_BHLD: Tensor) -> tuple[Tensor | None, ...]:
        ctx.recalled[:] = ctx.saved_tensors
        d_outs = d_BHLD.split(ctx.num_heads, dim=1)
        # The graph is kept for another backward, which costs nothing: it holds no tensors.
        gradients = torch.autograd.grad(ctx.ends, ctx.begins, d_outs, retain_graph=True)
        ctx.recalled.clear()
        return None, *gradients


def _slice_of_joined(tensor: Tensor, outs: Sequence[Tensor], joined_BHLD: Tensor) -> View | None:
    before = 0  # numbers of a token that belong to earlier calls
    of_token = joined_BHLD.shape[1] * joined_BHLD.shape[3]
    for out_BhLD in outs:
        own = out_BhLD.shape[1] * out_BhLD.shape[3]
        if view := View.of(tensor, out_BhLD):
            stride = tuple(step + step // own * (of_token - own) for step in view.stride)
            token, number = divmod(view.offset, own)
            return View(view.shape, stride, token * of_token + before + number)
        before += own
    return None


def _place(tensor: Tensor, kept: list[Tensor]) -> tuple[int, View]:
    """Return the index in `kept` of the tensor that `tensor` is a view of, and the view; append `tensor` if none."""
    for index, given in enumerate(kept):
        if view := View.of(tensor, given):
            return index, view
    kept.append(tensor.detach())
    return len(kept) - 1, View(tensor.shape, tuple(tensor.stride()), 0)
