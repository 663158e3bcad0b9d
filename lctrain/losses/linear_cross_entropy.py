"""Compute the cross-entropy of a linear head tile by tile, without ever holding all logits.

Shape legend: N tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOGITS = 2**26  # held at once, for any length and vocabulary: 2**26 * 4 bytes = 256 MiB in fp32


class _TiledLinearCrossEntropy(torch.autograd.Function):
    """The summed loss. Its gradients are known up to one scalar, so forward computes them while it holds a tile."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        d_hidden = torch.zeros_like(hidden_ND) if wanted[0] else None
        d_weight = torch.zeros_like(weight_VD, dtype=dtype) if wanted[1] else None
        d_bias = torch.zeros_like(bias_V, dtype=dtype) if wanted[2] and bias_V is not None else None
        losses_N = torch.zeros(labels_N.shape, dtype=dtype, device=hidden_ND.device)
        tile = max(1, MAX_LOGITS // weight_VD.shape[0])
        for start in range(0, labels_N.numel(), tile):
            rows = slice(start, start + tile)
            hidden, labels = hidden_ND[rows], labels_N[rows]
            logits, slope = cap(F.linear(hidden, weight_VD, bias_V).to(dtype), softcap)
            log_normalizer = logits.logsumexp(-1, keepdim=True)
            losses_N[rows] = (log_normalizer - logits.gather(-1, labels[:, None])).squeeze(-1)
            if not any(wanted):
                continue
            gradient = logits.sub_(log_normalizer).exp_()
            gradient.scatter_add_(-1, labels[:, None], torch.full_like(log_normalizer, -1.0))
            gradient = gradient if slope is None else gradient * slope
            if d_bias is not None:
                d_bias += gradient.sum(0)
            gradient = gradient.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] = gradient @ weight_VD.to(hidden.dtype)
            if d_weight is not None:
                d_weight += gradient.T @ hidden
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(losses_N)
        return losses_N.sum(), losses_N

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else (g * d_sum).to(dtype) for g, dtype in gradients), None, None


def cap(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return softcap · tanh(logits / softcap) and its slope; without a softcap, the logits and None."""
    if softcap is None:
        return logits, None
    tanh = torch.tanh(logits / softcap)
    return softcap * tanh, 1 - tanh.square()


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, *, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return -log softmax(softcap(hidden · weightᵀ + bias))[label], summed, and for each token without gradient.

    Labels must be valid ids: drop ignored tokens first. Computes in fp32, or fp64 for fp64 inputs.
    """
    if not torch.is_grad_enabled():  # needs_input_grad ignores this mode: detaching saves computing the gradients
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    losses: tuple[Tensor, Tensor] = _TiledLinearCrossEntropy.apply(hidden_ND, weight_VD, bias_V, labels_N, softcap)  # type: ignore[no-untyped-call]
    return losses
