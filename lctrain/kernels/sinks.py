"""Sinks beside a window: the window is one call of a fused kernel, and the first keys of a document are added to it.

With l = log Σ exp(s) over a query's window and l' over its window and its sinks, the output is
exp(l − l') · (the window's) + Σ exp(s − l') v over the sinks. The window's backward computes its weights exp(s − l) and
the products of output and gradient from what its forward saved: with the merged output and l' written over those, it
gives the gradients that its own keys have in the whole, and the sinks' are added to them.

Shape legend: B rows of L tokens, T of them all, H query heads, K key-value heads, D head dim, P documents of a row with
queries that see no sink in their window, N chunks of those queries, S sinks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_NUMBERS = 2**14  # of a head's sinks, which a program holds with the sums of their gradients
NUM_CHUNKS = 128  # of a long document: with its key-value heads enough to fill a card
MIN_CHUNK = 128

Window = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q_THD, k_TKD, v_TKD) -> out_THD and the natural log-sum-exp [B, H, L] of each query, both saved for its backward."""


class Sinks(NamedTuple):
    """The first `num` tokens of a document, for its queries behind the first `window`. All rows are alike."""

    num: int
    window: int
    starts: Tensor  # [P]: the first token of each document that is longer
    chunks: (
        Tensor  # [N, 4] of int32: a document's first token, from where to where its queries are, its place in `starts`
    )


def find_sinks(num: int, window: int, cu_seqlens: Tensor) -> Sinks | None:
    """None where no document is longer than the window."""
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    starts, ends = (x[ends - starts > window] for x in (starts, ends))
    if not starts.numel():
        return None
    size = max(MIN_CHUNK, 1 << (int(cu_seqlens[-1]) // NUM_CHUNKS - 1).bit_length())
    counts = (ends - starts - window + size - 1) // size
    document = torch.arange(len(starts), device=starts.device).repeat_interleave(counts)
    number = torch.arange(len(document), device=starts.device) - (counts.cumsum(0) - counts)[document]
    begins = (starts + window)[document] + number * size
    chunks = torch.stack((starts[document], begins, torch.minimum(begins + size, ends[document]), document), dim=1)
    return Sinks(num, window, starts, chunks.int())


def with_sinks(attend: Window, sinks: Sinks, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, scaling: float) -> Tensor:
    """The output [T, H, D] of a window and its sinks."""
    from lctrain.kernels.sinks_triton import merge  # needs triton

    handed: list[Tensor] = []
    q_THD, k_TKD, v_TKD = _Begin.apply(handed, sinks, scaling, q_THD, k_TKD, v_TKD)  # type: ignore[no-untyped-call]
    out_THD, lse_BHL = attend(q_THD, k_TKD, v_TKD)
    # `data`, because the window's backward must find what is written now, and not call it changed.
    merge(sinks, *(x.data for x in (q_THD, k_TKD, v_TKD, out_THD, lse_BHL)), scaling=scaling)
    ended: Tensor = _End.apply(handed, out_THD, lse_BHL)  # type: ignore[no-untyped-call]
    return ended


class _Begin(torch.autograd.Function):
    """The last of the backward: adds the sinks' gradients to the window's, in place."""

    @staticmethod
    def forward(ctx: Any, handed: list[Tensor], sinks: Sinks, scaling: float, *qkv: Tensor) -> tuple[Tensor, ...]:
        ctx.handed, ctx.sinks, ctx.scaling = handed, sinks, scaling
        ctx.save_for_backward(*qkv)
        return tuple(x.view_as(x) for x in qkv)

    @staticmethod
    def backward(ctx: Any, *d_qkv: Tensor) -> tuple[Tensor | None, ...]:
        from lctrain.kernels.sinks_triton import add_gradients

        sinks: Sinks = ctx.sinks
        out_THD, lse_BHL, d_out_THD = ctx.handed
        ctx.handed.clear()
        given = [*ctx.saved_tensors, out_THD, lse_BHL, d_out_THD, d_qkv[0]]
        sums = add_gradients(sinks, *given, scaling=ctx.scaling)
        num_rows, _, length = lse_BHL.shape
        rows = torch.arange(num_rows, device=lse_BHL.device)[:, None, None] * length
        tokens_BPS = rows + sinks.starts[:, None] + torch.arange(sinks.num, device=lse_BHL.device)
        for gradient_TKD, sum_BPSKD in zip(d_qkv[1:], sums, strict=True):
            gradient_TKD.index_add_(0, tokens_BPS.flatten(), sum_BPSKD.flatten(0, 2).to(gradient_TKD.dtype))
        return None, None, None, *d_qkv


class _End(torch.autograd.Function):
    """The first of the backward: hands the output and its gradient to the other."""

    @staticmethod
    def forward(ctx: Any, handed: list[Tensor], out_THD: Tensor, lse_BHL: Tensor) -> Tensor:
        ctx.handed = handed
        ctx.save_for_backward(out_THD, lse_BHL)
        return out_THD.view_as(out_THD)

    @staticmethod
    def backward(ctx: Any, d_THD: Tensor) -> tuple[Tensor | None, ...]:
        ctx.handed[:] = [*ctx.saved_tensors, d_THD]
        return None, d_THD, None
