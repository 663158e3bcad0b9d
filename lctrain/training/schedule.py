"""Learning-rate schedules over optimizer steps."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup(optimizer: Optimizer, *, num_warmup_steps: int) -> LambdaLR:
    """Return a linear warm-up, then a constant rate (LongLoRA's schedule)."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (num_warmup_steps + 1)))


def cosine(optimizer: Optimizer, *, num_warmup_steps: int, num_steps: int, min_ratio: float) -> LambdaLR:
    """Return a linear warm-up, then a half cosine from 1 to `min_ratio` of the learning rate at `num_steps`."""

    def ratio(step: int) -> float:
        if step < num_warmup_steps:
            return (step + 1) / (num_warmup_steps + 1)
        progress = min(1.0, (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, ratio)


def trapezoid(
    optimizer: Optimizer, *, num_warmup_steps: int, num_cooldown_steps: int, num_steps: int, min_ratio: float
) -> LambdaLR:
    """Return DuoAttention's schedule: linear up, constant, linear down to `num_steps`, never below `min_ratio` of the
    learning rate.
    """

    def ratio(step: int) -> float:
        up, down = (step + 1) / max(1, num_warmup_steps), (num_steps - step) / max(1, num_cooldown_steps)
        return min(1.0, max(min(up, down), min_ratio))

    return LambdaLR(optimizer, ratio)
