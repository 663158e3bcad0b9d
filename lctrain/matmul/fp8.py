"""Run frozen linear layers in 8-bit floating point. Shape legend: N tokens, I inputs, O outputs."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

from lctrain.errors import InputError

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
MULTIPLE = 16  # tensor cores need both sides of a matrix to be multiples of this


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (values, scales) with x = values · scale and one scale per row, which maps its largest |x| to 448."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(FP8), scale


@cache
def _compiled() -> Any:
    return torch.compile(_quantize, dynamic=True, fullgraph=True)  # reads memory once instead of five times


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of `x` as fp8 values and fp32 scales [N, 1]."""
    x = x.detach()  # drops the base of a view: torch.compile would compile anew for each shape of it
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
    """Return x · matrixᵀ in bf16, accumulated in fp32."""
    values, x_scales = quantize(x)
    by_row = ScalingType.RowWise
    return scaled_mm(values, matrix.contiguous().T, x_scales, by_row, scales.T, by_row, use_fast_accum=True)


class FP8Linear(nn.Module):
    """A linear layer that does not train and multiplies in E4M3 (Micikevicius et al., arXiv:2209.05433).

    The forward needs weights with one scale per output, the backward with one per input. So they are stored twice,
    which takes the bytes of bf16. Activations and gradients are scaled by row when they arrive.
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
        """Return x Wᵀ + bias in bf16; x is [..., I]."""
        return self.part(x, slice(None), slice(None))

    def part(self, x: Tensor, outputs: slice, inputs: slice) -> Tensor:
        """Return some outputs of the layer, or what some inputs add to all of them; the first inputs add the bias."""
        y: Tensor = _Multiply.apply(x.flatten(0, -2), self, outputs, inputs)  # type: ignore[no-untyped-call]
        y = y if self.bias is None or inputs.start else y + self.bias[outputs].to(y.dtype)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], -1)


def check(device: torch.device) -> None:
    """Raise InputError where `device` has no fp8 tensor cores that scale by row."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        raise InputError("precision=fp8 needs a card with fp8 tensor cores that scale by row: Hopper or later")
