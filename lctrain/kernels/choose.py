"""The one place where a kernel is chosen."""

from lctrain.errors import InputError
from lctrain.kernels.base import Kernel
from lctrain.kernels.flex import FlexKernel
from lctrain.kernels.reference import ReferenceKernel
from lctrain.kernels.sdpa import SDPAKernel

KERNELS: dict[str, type[Kernel]] = {"flex": FlexKernel, "sdpa": SDPAKernel, "reference": ReferenceKernel}


def choose(name: str, *, softcap: float | None, device_type: str) -> tuple[str, Kernel]:
    """The kernel called `name`; `auto` takes flex on CUDA and sdpa on CPU, or reference there for capped scores.

    Raises InputError for a choice that can't run, instead of running something else.
    """
    if name == "auto":
        name = "flex" if device_type == "cuda" else "sdpa" if softcap is None else "reference"
    if name not in KERNELS:
        raise InputError(f"no kernel '{name}'; choose auto, {', '.join(KERNELS)}")
    if name == "flex" and device_type != "cuda":
        raise InputError("kernel=flex needs a CUDA device; use kernel=auto")
    if softcap is not None and not KERNELS[name].supports_softcap:
        raise InputError(f"kernel={name} can't cap attention scores as this model does; use kernel=auto")
    return name, KERNELS[name]()
