"""Sum over shares of a layer's width, one share at a time. Shape legend: B rows, L tokens, D hidden, N = B·L."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lctrain.memory.recall import recomputed, save

Share = TypeVar("Share")


def sum_over_shares(run: Callable[[Tensor, Share], Tensor], hidden_BLD: Tensor, shares: Iterable[Share]) -> Tensor:
    """Return Σ run(hidden, share), where each result is [N, D].

    One share's activations are freed before the next share begins, in the backward too. In a checkpointed layer each
    share's linear layers run once more than without shares; its attention does not.
    """
    if torch.is_grad_enabled():
        if not hidden_BLD.requires_grad:  # in the first layer; only a tensor in the graph can be recalled
            hidden_BLD = hidden_BLD.detach().requires_grad_()
        (hidden_BLD,), recall = save(hidden_BLD)
        parts = (recomputed(partial(_run, run, share), hidden_BLD, lambda: recall()[0]) for share in shares)
    else:
        parts = (run(hidden_BLD, share) for share in shares)
    total = next(parts)
    for part in parts:
        total = total.add_(part)  # on [N, D], not on views: autograd would copy gradients for views
    return total.view_as(hidden_BLD)


def _run(run: Callable[[Tensor, Share], Tensor], share: Share, hidden_BLD: Tensor) -> Tensor:
    return run(hidden_BLD, share)
