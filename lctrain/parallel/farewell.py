"""How processes leave a run that went well."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lctrain.errors import Stopped


@contextmanager
def farewell() -> Iterator[None]:
    """Lets go of what trained, as another model comes to the device now, and of the process group.

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
    gc.collect()  # trainer and module hold each other, and the group
    if dist.is_initialized():
        dist.destroy_process_group()
