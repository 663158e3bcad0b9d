"""Rotary embeddings once more: keys and queries that are stored with their position move to another one.

Shape legend: B batch, H heads, L tokens, D head dim, R rotated dims (D, or fewer in models that rotate a part).
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lctrain.errors import InputError

GROWING = ("dynamic", "longrope")  # their frequencies depend on how long the row is


class Rotation:
    """Turns what a model's rotary embedding has turned by some more positions; distances are all that scores know."""

    def __init__(self, model: PreTrainedModel) -> None:
        """InputError if the model's embedding can't be continued this way."""
        module: Any = getattr(model.get_decoder(), "rotary_emb", None)
        rotate_half = getattr(sys.modules[type(model).__module__], "rotate_half", None)
        probe = torch.arange(4.0)
        if module is None or rotate_half is None or rotate_half(probe).tolist() != [-2.0, -3.0, 0.0, 1.0]:
            raise InputError(f"{type(model).__name__} does not rotate halves of its heads; use cache.positions=text")
        self._module = module
        self._rotate_half: Callable[[Tensor], Tensor] = rotate_half

    def __call__(self, x_BHLD: Tensor, by_BL: Tensor) -> Tensor:
        """`x` at positions that are `by` [B or 1, L or 1] higher; angles are taken in fp64: a row may be long."""
        angles = by_BL[:, None, :, None].double() * self._module.inv_freq.to(x_BHLD.device, torch.float64)
        dtype = torch.promote_types(x_BHLD.dtype, torch.float32)
        cos, sin = (torch.cat((f(angles),) * 2, dim=-1).to(dtype) for f in (torch.cos, torch.sin))
        x, rest = x_BHLD[..., : cos.shape[-1]], x_BHLD[..., cos.shape[-1] :]
        return torch.cat(((x * cos + self._rotate_half(x) * sin).to(rest.dtype), rest), dim=-1)


def require_fixed_frequencies(config: PreTrainedConfig) -> None:
    """InputError where a row's length decides its frequencies: no rotation moves what was placed by others."""
    kind = (getattr(config.get_text_config(), "rope_parameters", None) or {}).get("rope_type")
    if kind in GROWING:
        raise InputError(f"rope_type={kind} has other frequencies in longer rows; use cache.positions=text")
