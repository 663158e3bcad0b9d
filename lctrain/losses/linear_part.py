"""Compute a part of a linear layer. Shape legend: I inputs."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

ALL = slice(None)


def linear_part(linear: Any, x: Tensor, *, outputs: slice = ALL, inputs: slice = ALL) -> Tensor:
    """Return some outputs of `linear`, or what some inputs add to all of them; the first inputs add the bias.

    x is [..., I]. A layer that is more than weight and bias has its own `part(x, outputs, inputs)`, which is called.
    """
    if hasattr(linear, "part"):
        return linear.part(x, outputs, inputs)  # type: ignore[no-any-return]
    bias = None if linear.bias is None or inputs.start else linear.bias[outputs]
    return F.linear(x, linear.weight[outputs, inputs], bias)
