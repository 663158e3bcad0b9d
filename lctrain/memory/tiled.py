"""Compute the MLP some tokens at a time. Shape legend: B rows, L tokens, D hidden."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lctrain.memory.recall import Recall, recomputed, save


class TiledMLP(nn.Module):
    """An MLP that runs on tiles of tokens and again in the backward: inner activations exist for one tile at a time.

    In a checkpointed layer that costs no time: the layer's own recomputation stops at the MLP's input, because nothing
    after it is kept, and so the MLP is recomputed once either way. The children are those of `mlp` under the same
    names, so that parameters and checkpoints do not change.
    """

    def __init__(self, mlp: nn.Module, tile: int) -> None:
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self._tile = tile
        self._run: Callable[[Tensor], Tensor] = mlp.forward

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """Return mlp(hidden), [B, L, D]."""
        recall: Recall | None = None
        if hidden_BLD.shape[1] > self._tile and torch.is_grad_enabled() and hidden_BLD.requires_grad:
            (hidden_BLD,), recall = save(hidden_BLD)
        tiles = hidden_BLD.split(self._tile, dim=1)
        if recall is None:
            return torch.cat([self._run(tile) for tile in tiles], dim=1)
        return torch.cat([self._recomputed(tile, index, recall) for index, tile in enumerate(tiles)], dim=1)

    def _recomputed(self, tile_BLD: Tensor, index: int, recall: Recall) -> Tensor:
        return recomputed(self._run, tile_BLD, lambda: recall()[0].split(self._tile, dim=1)[index])
