"""How ranks leave a run that went well."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lctrain.errors import Stopped


@contextmanager
def farewell() -> Iterator[None]:
    """Ends the process group behind what was done together, or was stopped together.

    Gloo's threads would outlive the interpreter, and abort the process where one lets go of a Python object then. A
    rank that failed must not wait for them: they may be in an exchange that the others never enter.
    """
    try:
        yield
    except Stopped:
        _end()
        raise
    _end()


def _end() -> None:
    if dist.is_initialized():
        gc.collect()  # a group ends with the last that holds it, and trainer and module hold each other
        dist.destroy_process_group()
