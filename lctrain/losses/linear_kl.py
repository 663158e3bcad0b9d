"""Compute the KL divergence of two models' predictions under one linear head tile by tile, without holding all logits.

Shape legend: N tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.losses.linear_cross_entropy import MAX_LOGITS, cap


class _TiledLinearKL(torch.autograd.Function):
    """The summed divergence. Its gradient is known up to one scalar, so forward computes it while it holds a tile."""

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        teacher_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        dtype = torch.promote_types(student_ND.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=student_ND.device)
        d_student_ND = torch.zeros_like(student_ND)
        tile = max(1, MAX_LOGITS // (2 * weight_VD.shape[0]))  # halved: logits of student and teacher are held
        for start in range(0, student_ND.shape[0], tile):
            rows = slice(start, start + tile)
            logits, slope = cap(F.linear(student_ND[rows], weight_VD, bias_V).to(dtype), softcap)
            log_student = logits.log_softmax(-1)
            log_teacher = cap(F.linear(teacher_ND[rows], weight_VD, bias_V).to(dtype), softcap)[0].log_softmax(-1)
            probability = log_teacher.exp()
            total += (probability * (log_teacher - log_student)).sum()
            gradient = log_student.exp_().sub_(probability)
            gradient = gradient if slope is None else gradient * slope
            d_student_ND[rows] = gradient.to(student_ND.dtype) @ weight_VD.to(student_ND.dtype)
        ctx.save_for_backward(d_student_ND)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        (d_student_ND,) = ctx.saved_tensors
        return (d_student_ND * d_total).to(d_student_ND.dtype), None, None, None, None


def linear_kl(
    student_ND: Tensor, teacher_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, *, softcap: float | None = None
) -> Tensor:
    """Return the sum over tokens of KL(teacher ‖ student) in nats, each softmax(softcap(hidden · weightᵀ + bias)).

    Only the student gets a gradient: teacher and head must be frozen. Computes in fp32, or fp64 for fp64 inputs.
    """
    total: Tensor = _TiledLinearKL.apply(student_ND, teacher_ND, weight_VD, bias_V, softcap)  # type: ignore[no-untyped-call]
    return total
