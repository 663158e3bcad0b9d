"""Rotate keys and queries that already have a rotary position to another position.

Shape legend: B batch, H heads, L tokens, D head dim, R rotated dims (D, or fewer in models that rotate a part).
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lctrain.errors import InputError

GROWING = ("dynamic", "longrope")  # rope types whose frequencies depend on the length of the row


class Rotation:
    """A function that rotates keys or queries further, by some positions, after a model's rotary embedding.

    This is exact, because scores depend on distances only.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Take the frequencies of `model`; raise InputError if its embedding does not rotate halves of heads."""
        module: Any = getattr(model.get_decoder(), "rotary_emb", None)
        rotate_half = getattr(sys.modules[type(model).__module__], "rotate_half", None)
        probe = torch.arange(4.0)
        if module is None or rotate_half is None or rotate_half(probe).tolist() != [-2.0, -3.0, 0.0, 1.0]:
            raise InputError(f"{type(model).__name__} does not rotate halves of its heads; use cache.positions=text")
        self._module = module
        self._rotate_half: Callable[[Tensor], Tensor] = rotate_half

    def __call__(self, x_BHLD: Tensor, by_BL: Tensor) -> Tensor:
        """Return `x` at positions that are `by` [B or 1, L or 1] higher; angles are fp64 because a row may be long."""
        angles = by_BL[:, None, :, None].double() * self._module.inv_freq.to(x_BHLD.device, torch.float64)
        dtype = torch.promote_types(x_BHLD.dtype, torch.float32)
        cos, sin = (torch.cat((f(angles),) * 2, dim=-1).to(dtype) for f in (torch.cos, torch.sin))
        x, rest = x_BHLD[..., : cos.shape[-1]], x_BHLD[..., cos.shape[-1] :]
        return torch.cat(((x * cos + self._rotate_half(x) * sin).to(rest.dtype), rest), dim=-1)


def require_fixed_frequencies(config: PreTrainedConfig) -> None:
    """Raise InputError where frequencies depend on a row's length: then no rotation moves keys of a shorter row."""
    kind = (getattr(config.get_text_config(), "rope_parameters", None) or {}).get("rope_type")
    if kind in GROWING:
        raise InputError(f"rope_type={kind} has other frequencies in longer rows; use cache.positions=text")
