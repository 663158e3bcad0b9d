"""Ranks leave what went well without a thread behind them, and what failed at once."""

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lctrain.errors import RunError, Stopped
from lctrain.parallel.cleanup import cleanup


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(1))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def gloo_threads() -> list[str]:
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo_runloop" in name]


@pytest.mark.parametrize("end", [None, Stopped("asked to")])
def test_nothing_of_the_group_outlives_what_went_well(group, end):
    before = len(gloo_threads())
    assert before
    with contextlib.suppress(Stopped), cleanup():
        if end:
            raise end
    assert not dist.is_initialized()
    assert len(gloo_threads()) < before


def test_who_failed_waits_for_nobody(group):
    with pytest.raises(RunError), cleanup():
        raise RunError("disk full")
    assert dist.is_initialized()
    assert gloo_threads()


def test_one_process_lets_go_of_what_trained():
    class Knot:
        def __init__(self) -> None:
            self.itself = self

    with cleanup():
        knot = weakref.ref(Knot())
        assert knot()
    assert not knot()
    assert not dist.is_initialized()
