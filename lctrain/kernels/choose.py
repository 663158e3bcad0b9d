"""The one place where a kernel is chosen."""

import torch

from lctrain.errors import InputError
from lctrain.kernels.base import Kernel
from lctrain.kernels.flex import FlexKernel
from lctrain.kernels.reference import ReferenceKernel
from lctrain.kernels.sdpa import SDPAKernel

KERNELS: dict[str, type[Kernel]] = {"flex": FlexKernel, "sdpa": SDPAKernel, "reference": ReferenceKernel}


def choose(
    name: str, *, plain_causal: bool, softcap: float | None, device_type: str | None = None
) -> tuple[str, Kernel]:
    """The kernel called `name`; `auto` takes sdpa on CPU or for plain causal attention, flex for patterns on CUDA.

    Raises InputError for a choice that can't run, instead of running something else.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "auto":
        if device_type == "cuda" and not plain_causal:
            name = "flex"
        else:
            name = "reference" if softcap is not None and device_type == "cpu" else "sdpa"
        if name == "sdpa" and softcap is not None:
            name = "flex"
    if name not in KERNELS:
        raise InputError(f"no kernel '{name}'; choose auto, {', '.join(KERNELS)}")
    if name == "flex" and device_type != "cuda":
        raise InputError("kernel=flex needs a CUDA device; use kernel=auto")
    if softcap is not None and not KERNELS[name].supports_softcap:
        raise InputError(f"kernel={name} can't cap attention scores as this model does; use kernel=auto")
    return name, KERNELS[name]()
