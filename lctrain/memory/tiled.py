"""The MLP, some tokens at a time. Shape legend: B rows, L tokens, D hidden."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lctrain.memory.recall import Recall, save


class TiledMLP(nn.Module):
    """Runs `mlp` on tiles of tokens, each computed again in the backward: its inner width exists for one tile only.

    In a checkpointed layer that costs nothing. The layer's own recomputation stops at the MLP's input, as nothing
    behind it is kept, and so the MLP is recomputed once either way. The children are those of `mlp` under the same
    names, so that parameters and checkpoints do not change.
    """

    def __init__(self, mlp: nn.Module, tile: int) -> None:
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self._tile = tile
        self._run: Callable[[Tensor], Tensor] = mlp.forward

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """mlp(hidden), [B, L, D]."""
        recall: Recall | None = None
        if hidden_BLD.shape[1] > self._tile and torch.is_grad_enabled() and hidden_BLD.requires_grad:
            (hidden_BLD,), recall = save(hidden_BLD)
        tiles = hidden_BLD.split(self._tile, dim=1)
        if recall is None:
            return torch.cat([self._run(tile) for tile in tiles], dim=1)
        return torch.cat([self._checkpointed(tile, index, recall) for index, tile in enumerate(tiles)], dim=1)

    def _checkpointed(self, tile_BLD: Tensor, index: int, recall: Recall) -> Tensor:
        first = [tile_BLD]  # not an argument of the checkpoint, which would keep it

        def run() -> Tensor:
            return self._run(first.pop() if first else recall()[0].split(self._tile, dim=1)[index])

        with saved_tensors_hooks(_as_it_is, _as_it_is):  # what a checkpoint saves itself would count as the layer's
            return checkpoint(run, use_reentrant=False)  # type: ignore[no-any-return]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
