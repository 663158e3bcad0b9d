"""A low-rank term added to a linear layer's output, in place. Shape legend: N tokens, I in, O out, R rank."""

from typing import Any

import torch
from torch import Tensor


class _AddLowRank(torch.autograd.Function):
    """Computes in the output's dtype: what trains is fp32, and casting N·I activations to it would cost more than R."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
        x_NI, a, b = x.flatten(0, -2).to(y.dtype), a_RI.to(y.dtype), b_OR.to(y.dtype)
        low_NR = x_NI @ a.T
        y.view(-1, y.shape[-1]).addmm_(low_NR, b.T, alpha=scaling)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, a_RI, b_OR, low_NR)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a_RI, b_OR, low_NR = ctx.saved_tensors
        dy_NO = dy.reshape(-1, dy.shape[-1])
        d_low_NR = (dy_NO @ b_OR.to(dy.dtype)).mul_(ctx.scaling)
        d_x = (d_low_NR @ a_RI.to(dy.dtype)).view(x.shape).to(x.dtype) if ctx.needs_input_grad[1] else None
        d_a = (d_low_NR.T @ x.flatten(0, -2).to(dy.dtype)).to(a_RI.dtype)
        d_b = (dy_NO.T @ low_NR).mul_(ctx.scaling).to(b_OR.dtype)
        return dy, d_x, d_a, d_b, None


def add_low_rank(y: Tensor, x: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """y + scaling · x aᵀ bᵀ, written into `y` [..., O]; x is [..., I]."""
    out: Tensor = _AddLowRank.apply(y, x, a_RI, b_OR, scaling)  # type: ignore[no-untyped-call]
    return out
