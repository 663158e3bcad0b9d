"""End the process group and free the model when a run ends without failing."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from lctrain.errors import Stopped


@contextmanager
def cleanup() -> Iterator[None]:
    """Free the trained model and destroy the process group after the block, if it ends well or raises Stopped.

    Freeing makes room for the next model on the device. Gloo's threads would outlive the interpreter, and abort the
    process if one then freed a Python object. After any other exception nothing is done: a rank that failed must not
    wait for these threads, which may be in an exchange that the other ranks never enter.
    """
    try:
        yield
    except Stopped:
        _end()
        raise
    _end()


def _end() -> None:
    gc.collect()  # trainer and module refer to each other, and to the process group
    if dist.is_initialized():
        dist.destroy_process_group()
