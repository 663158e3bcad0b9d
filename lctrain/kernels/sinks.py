"""Add the sinks, which are the first keys of a document, to a window that one call of a fused kernel computes.

With l = log Σ exp(s) over a query's window and l' over its window and its sinks, the output is
exp(l − l') · (output of the window) + Σ exp(s − l') v over the sinks. The window's backward computes its weights
exp(s − l) and the products of output and gradient from the output and l that its forward saved. The merged output and
l' are written over those, so that this backward gives the window's part of the whole gradient; the part of the sinks
is added to it.

Shape legend: B rows of L tokens, H query heads, K key-value heads, D head dim, S sinks, P documents of a row that are
longer than the window, N chunks of their queries.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_SINKS = 16  # the least that tensor cores take
MAX_NUMBERS = 2**14  # sinks times width of a head: a program holds them and the sums of their gradients
ROOM = 160 * 2**10  # bytes of shared memory that Triton needs for MAX_NUMBERS; Ada has 99 KiB, enough for half
NUM_CHUNKS = 128  # of all tokens; times the key-value heads they are enough programs to fill a card
MIN_CHUNK = 128

Window = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q_BLHD, k_BLKD, v_BLKD) -> out_BLHD and the natural log-sum-exp [B, H, L] of each query, both saved for backward."""


class Sinks(NamedTuple):
    """The first tokens of each long document, which its queries after the first `window` see. All rows are alike."""

    window: int
    tokens: Tensor  # [P, S]
    chunks: Tensor  # [N, 4], int32: first token of the document, first and end of the queries, row of `tokens`


def find_sinks(num: int, window: int, cu_seqlens: Tensor, device: torch.device) -> Sinks | None:
    """Return the sinks; None where no document is longer than the window. `cu_seqlens` are on the host."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    starts, ends = (x[ends - starts > window] for x in (starts, ends))
    if not starts.numel():
        return None
    size = max(MIN_CHUNK, 1 << (int(cu_seqlens[-1]) // NUM_CHUNKS - 1).bit_length())
    counts = (ends - starts - window + size - 1) // size
    document = torch.arange(len(starts)).repeat_interleave(counts)
    number = torch.arange(len(document)) - (counts.cumsum(0) - counts)[document]
    begins = (starts + window)[document] + number * size
    chunks = torch.stack((starts[document], begins, torch.minimum(begins + size, ends[document]), document), dim=1)
    tokens = starts[:, None] + torch.arange(num)
    return Sinks(window, tokens.to(device), chunks.int().to(device))


def padded(num: int, head_dim: int) -> tuple[int, int]:
    """Return the number of sinks and the width of a head, each rounded up to the power of two that a program holds."""
    return max(MIN_SINKS, 1 << (num - 1).bit_length()), 1 << (head_dim - 1).bit_length()


def fits(num: int, head_dim: int, device: torch.device) -> bool:
    """Return whether a program on `device` has room for `num` sinks."""
    sinks, width = padded(num, head_dim)
    if shared_memory(device) >= ROOM:
        return sinks * width <= MAX_NUMBERS
    return sinks * width <= (MAX_NUMBERS // 2 if width <= 128 else MAX_NUMBERS // 4)


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program on `device` may use; without a card, `ROOM`."""
    if device.type != "cuda":
        return ROOM
    num_bytes: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return num_bytes


def with_sinks(attend: Window, sinks: Sinks, q_BLHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, scaling: float) -> Tensor:
    """Return the output [B, L, H, D] of a window and its sinks."""
    from lctrain.kernels.sinks_triton import merge  # needs triton

    handed: list[Tensor] = []
    q_BLHD, k_BLKD, v_BLKD = _Begin.apply(handed, sinks, scaling, q_BLHD, k_BLKD, v_BLKD)  # type: ignore[no-untyped-call]
    out_BLHD, lse_BHL = attend(q_BLHD, k_BLKD, v_BLKD)
    # `data`, because the window's backward must read what is written here, and autograd must not call it changed.
    # Saved-tensor hooks that copy would keep the output before merging; the hooks of lctrain keep views.
    merge(sinks, q_BLHD.data, k_BLKD.data, v_BLKD.data, out_BLHD.data, lse_BHL.data, scaling)
    ended: Tensor = _End.apply(handed, out_BLHD, lse_BHL)  # type: ignore[no-untyped-call]
    return ended


class _Begin(torch.autograd.Function):
    """The identity on q, k and v; its backward, which runs last, adds the sinks' gradients to the window's in place."""

    @staticmethod
    def forward(ctx: Any, handed: list[Tensor], sinks: Sinks, scaling: float, *qkv: Tensor) -> tuple[Tensor, ...]:
        ctx.handed, ctx.sinks, ctx.scaling = handed, sinks, scaling
        ctx.save_for_backward(*qkv)
        return tuple(x.view_as(x) for x in qkv)

    @staticmethod
    def backward(ctx: Any, *d_qkv: Tensor) -> tuple[Tensor | None, ...]:
        from lctrain.kernels.sinks_triton import add_gradients

        sinks: Sinks = ctx.sinks
        out_BLHD, lse_BHL, d_out_BLHD = ctx.handed
        ctx.handed.clear()
        q_BLHD, k_BLKD, v_BLKD = ctx.saved_tensors
        sums = add_gradients(
            sinks, q_BLHD, k_BLKD, v_BLKD, out_BLHD, lse_BHL, d_out_BLHD, d_qkv[0], ctx.scaling
        )  # fmt: skip
        for gradient_BLKD, sum_BPSKD in zip(d_qkv[1:], sums, strict=True):
            gradient_BLKD.index_add_(1, sinks.tokens.flatten(), sum_BPSKD.flatten(1, 2).to(gradient_BLKD.dtype))
        return None, None, None, *d_qkv


class _End(torch.autograd.Function):
    """The identity on the output; its backward, which runs first, hands the output and its gradient to `_Begin`."""

    @staticmethod
    def forward(ctx: Any, handed: list[Tensor], out_BLHD: Tensor, lse_BHL: Tensor) -> Tensor:
        ctx.handed = handed
        ctx.save_for_backward(out_BLHD, lse_BHL)
        return out_BLHD.view_as(out_BLHD)

    @staticmethod
    def backward(ctx: Any, d_out_BLHD: Tensor) -> tuple[Tensor | None, ...]:
        d_out_BLHD = d_out_BLHD if d_out_BLHD.stride(3) == 1 else d_out_BLHD.contiguous()
        # Detached: if the window's backward fails, a graph that refers to itself would never be freed.
        ctx.handed[:] = [*(x.detach() for x in ctx.saved_tensors), d_out_BLHD]
        return None, d_out_BLHD, None
