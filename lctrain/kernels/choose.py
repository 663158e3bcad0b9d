"""Choose the kernel of a run; no other module does."""

from lctrain.errors import InputError
from lctrain.kernels.base import Demand, Kernel
from lctrain.kernels.cudnn import CudnnKernel
from lctrain.kernels.flash import FlashKernel
from lctrain.kernels.flash2 import Flash2Kernel
from lctrain.kernels.flex import FlexKernel
from lctrain.kernels.reference import ReferenceKernel
from lctrain.kernels.sdpa import SDPAKernel
from lctrain.kernels.varlen import VarlenKernel

KERNELS: dict[str, type[Kernel]] = {  # the fastest first, as measured in docs/results/kernels.md
    "flash": FlashKernel,
    "cudnn": CudnnKernel,
    "flash2": Flash2Kernel,
    "varlen": VarlenKernel,
    "flex": FlexKernel,
    "sdpa": SDPAKernel,
    "reference": ReferenceKernel,
}


def choose(name: str, demand: Demand) -> tuple[str, Kernel]:
    """Return the name and an instance of the kernel `name`; `auto` takes the first that meets `demand`.

    Raises InputError for a choice that can't run, and never runs another kernel in its place.
    """
    if name == "auto":
        name = next(name for name, kernel in KERNELS.items() if kernel.refusal(demand) is None)
    if name not in KERNELS:
        raise InputError(f"no kernel '{name}'; choose auto, {', '.join(KERNELS)}")
    if reason := KERNELS[name].refusal(demand):
        raise InputError(f"kernel={name} {reason}")
    return name, KERNELS[name]()
