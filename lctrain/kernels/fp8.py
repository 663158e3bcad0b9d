"""Frozen linear layers in 8-bit floating point. Shape legend: N tokens, I in, O out."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

from lctrain.errors import InputError

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
MULTIPLE = 16  # of both sides of a matrix: what the tensor cores take


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = values · scale with one scale a row, so that a row's largest magnitude is what fp8 holds at most."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(FP8), scale


@cache
def _compiled() -> Any:
    return torch.compile(_quantize, dynamic=True, fullgraph=True)  # one pass over memory instead of five


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values in fp8, fp32 scales [N, 1]) of the rows of `x`."""
    x = x.detach()  # not a view any more: torch.compile compiles anew for each shape that is viewed
    quantized: tuple[Tensor, Tensor] = (_compiled() if x.is_cuda else _quantize)(x)
    return quantized


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, layer: "FP8Linear", outputs: slice, inputs: slice) -> Tensor:
        ctx.layer, ctx.outputs, ctx.inputs, ctx.dtype = layer, outputs, inputs, x_NI.dtype
        return _rows(x_NI, layer.rows[outputs, inputs], layer.row_scales[outputs])

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        layer, outputs, inputs = ctx.layer, ctx.outputs, ctx.inputs
        d_x = _rows(dy_NO, layer.columns[inputs, outputs], layer.column_scales[inputs]).to(ctx.dtype)
        return d_x, None, None, None


def _rows(x: Tensor, matrix: Tensor, scales: Tensor) -> Tensor:
    """x · matrixᵀ in bf16, accumulated in fp32."""
    values, x_scales = quantize(x)
    by_row = ScalingType.RowWise
    return scaled_mm(values, matrix.contiguous().T, x_scales, by_row, scales.T, by_row, use_fast_accum=True)


class FP8Linear(nn.Module):
    """A linear layer that does not train, by E4M3 products (Micikevicius et al., arXiv:2209.05433).

    Weights have a scale for each output going forward and one for each input going back, so they are stored twice:
    the bytes of bf16. Activations and gradients are scaled by row as they come.
    """

    rows: Tensor
    row_scales: Tensor
    columns: Tensor
    column_scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if linear.weight.shape[0] % MULTIPLE or linear.weight.shape[1] % MULTIPLE:
            raise InputError(
                f"precision=fp8 needs matrices in multiples of {MULTIPLE}, not {tuple(linear.weight.shape)}"
            )
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight_OI = linear.weight.detach()
        for name, matrix in (("row", weight_OI), ("column", weight_OI.T.contiguous())):
            values, scales = _quantize(matrix)
            self.register_buffer(f"{name}s", values, persistent=False)
            self.register_buffer(f"{name}_scales", scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias in bf16; x is [..., I]."""
        return self.part(x, slice(None), slice(None))

    def part(self, x: Tensor, outputs: slice, inputs: slice) -> Tensor:
        """These outputs of the layer, or what these inputs add to it; the first of them bring the bias."""
        y: Tensor = _Multiply.apply(x.flatten(0, -2), self, outputs, inputs)  # type: ignore[no-untyped-call]
        y = y if self.bias is None or inputs.start else y + self.bias[outputs].to(y.dtype)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


def check(device: torch.device) -> None:
    """InputError where there are no fp8 tensor cores."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        raise InputError("precision=fp8 needs a card with fp8 tensor cores that scale by row: Hopper or later")
