"""The MLP, some tokens at a time. Shape legend: B rows, L tokens, D hidden."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
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
        length = hidden_BLD.shape[1]
        starts = range(0, length, self._tile)
        if len(starts) == 1 or not torch.is_grad_enabled() or not hidden_BLD.requires_grad:
            return torch.cat([self._run(hidden_BLD[:, start : start + self._tile]) for start in starts], dim=1)
        (hidden_BLD,), recall = save(hidden_BLD)
        tiles = [self._checkpointed(hidden_BLD, start, recall) for start in starts]
        return torch.cat(tiles, dim=1)

    def _checkpointed(self, hidden_BLD: Tensor, start: int, recall: Recall) -> Tensor:
        first = [hidden_BLD]

        def run() -> Tensor:
            hidden = first.pop() if first else recall()[0]
            return self._run(hidden[:, start : start + self._tile])

        return checkpoint(run, use_reentrant=False)  # type: ignore[no-any-return]
