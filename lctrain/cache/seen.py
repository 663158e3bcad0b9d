"""Show an eviction policy what the queries of one forward saw.

Shape legend: B batch, H query heads, K key-value heads, G query heads of a key-value head, L queries, S keys, D head
dim, T queries of a tile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 2**26  # attention weights in memory at once


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The queries of one forward in one layer, the keys kept before it, and its own keys, which come last."""

    queries: Tensor  # [B, H, L, D]
    keys: Tensor  # [B, K, S, D], as the model rotated them
    values: Tensor  # [B, K, S, D]
    positions: Tensor  # int32 [B, K, S]: each token's position in its row; -1 where a slot holds no token
    scores: Tensor  # [B, K, S]: what the policy returned after the forward before; 0 for new keys
    scaling: float

    def received(self, last: int | None = None) -> Tensor:
        """Return the attention weight that each key received, [B, K, S] in fp32 or fp64.

        It is summed over the row's last `last` queries (None: all of them) and over the query heads that share the key.
        Padding gives and receives nothing.
        """
        num_rows, num_heads, length, _ = self.queries.shape
        positions_BL = self.positions[:, 0, -length:]
        chosen_BL = positions_BL.argsort(1)[:, 0 if last is None else -last :]  # padding comes first
        row = torch.arange(num_rows, device=chosen_BL.device)[:, None]
        received_BKS = torch.zeros_like(self.scores)
        for chosen_BT in chosen_BL.split(max(1, TILE // (num_rows * num_heads * self.keys.shape[2])), dim=1):
            q_BTHD = self.queries.transpose(1, 2)[row, chosen_BT]
            received_BKS += self._weights(q_BTHD.transpose(1, 2), positions_BL[row, chosen_BT]).sum((2, 3))
        return received_BKS

    def _weights(self, q_BHTD: Tensor, positions_BT: Tensor) -> Tensor:
        """Return the softmax [B, K, G, T, S] of queries at these positions over the keys; 0 for padding."""
        q_BKGTD = q_BHTD.unflatten(1, (self.keys.shape[1], -1))
        logits = torch.einsum("bkgtd,bksd->bkgts", q_BKGTD, self.keys).to(self.scores.dtype) * self.scaling
        q_pos, kv_pos = positions_BT[:, None, None, :, None], self.positions[:, :, None, None]
        weights = logits.masked_fill((kv_pos < 0) | (kv_pos > q_pos), float("-inf")).softmax(-1)
        return weights.masked_fill(q_pos < 0, 0)
