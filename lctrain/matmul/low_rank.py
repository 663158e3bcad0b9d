"""Add a low-rank term to a linear layer's output, in place. Shape legend: N tokens, I inputs, O outputs, R rank."""

from typing import Any

import torch
from torch import Tensor


class _AddLowRank(torch.autograd.Function):
    """The addition, computed in the output's dtype.

    Casting the fp32 matrices that train costs less than casting N·I activations to fp32.
    """

    @staticmethod
    def forward(ctx: Any, y_NO: Tensor, x_NI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
        low_NR = x_NI.to(y_NO.dtype) @ a_RI.to(y_NO.dtype).T
        y_NO.addmm_(low_NR, b_OR.to(y_NO.dtype).T, alpha=scaling)
        ctx.mark_dirty(y_NO)
        ctx.save_for_backward(x_NI, a_RI, b_OR, low_NR)
        ctx.scaling = scaling
        return y_NO

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, a_RI, b_OR, low_NR = ctx.saved_tensors
        d_low_NR = (dy_NO @ b_OR.to(dy_NO.dtype)).mul_(ctx.scaling)
        d_x = (d_low_NR @ a_RI.to(dy_NO.dtype)).to(x_NI.dtype) if ctx.needs_input_grad[1] else None
        d_a = (d_low_NR.T @ x_NI.to(dy_NO.dtype)).to(a_RI.dtype)
        d_b = (dy_NO.T @ low_NR).mul_(ctx.scaling).to(b_OR.dtype)
        return dy_NO, d_x, d_a, d_b, None


def add_low_rank(y_NO: Tensor, x_NI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """Return y + scaling · x aᵀ bᵀ, written into y."""
    out: Tensor = _AddLowRank.apply(y_NO, x_NI, a_RI, b_OR, scaling)  # type: ignore[no-untyped-call]
    return out
