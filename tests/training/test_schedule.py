"""The learning rate at every optimizer step, against what the words say."""

import math

import pytest
import torch
from torch.optim import SGD

from lctrain.training.schedule import cosine, trapezoid, warmup


def rates(make, count, /, **settings):
    """The learning rates that the steps use, of a peak of 1."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, seen = make(optimizer, **settings), []
    for _ in range(count):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_warmup_rises_in_equal_steps_and_stays():
    assert rates(warmup, 6, num_warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert rates(warmup, 2, num_warmup_steps=0) == [1, 1]


def test_cosine_falls_to_its_floor_and_stays_there():
    seen = rates(cosine, 14, num_warmup_steps=3, num_steps=11, min_ratio=0.2)
    assert seen[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert seen[7] == pytest.approx(0.6)  # half-way between 1 and 0.2
    assert seen[5] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert seen[11:] == pytest.approx([0.2] * 3)


def test_a_warmup_longer_than_the_run_only_rises():
    seen = rates(cosine, 4, num_warmup_steps=20, num_steps=4, min_ratio=0.1)
    assert seen == sorted(seen)
    assert seen[-1] < 0.2


def test_a_trapezoid_rises_stays_and_falls_but_not_to_nothing():
    seen = rates(trapezoid, 20, num_warmup_steps=5, num_cooldown_steps=10, num_steps=20, min_ratio=0.25)
    assert seen[:5] == pytest.approx([0.25, 0.4, 0.6, 0.8, 1])
    assert seen[5:11] == [1] * 6
    assert seen[11:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.25])


def test_ramps_that_meet_never_reach_the_top():
    assert max(rates(trapezoid, 8, num_warmup_steps=8, num_cooldown_steps=8, num_steps=8, min_ratio=0.1)) < 0.7
