"""The base of methods that choose, for each query and head, which earlier blocks of keys it attends to.

Shape legend: B batch, H query heads, K key-value heads, G query heads of a key-value head, L queries, S keys,
N blocks of a row, M tokens of a block, D head dim.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lctrain.attention.base import Attention, Call, Cost, Layout, Rows, require_positive
from lctrain.attention.blocks import Blocks, refuse_own_window


@dataclass(frozen=True, kw_only=True)
class SelectedBlocks(Attention):
    """Attention to the query's own block and the `top_k` - 1 earlier blocks of its document with the best scores.

    Blocks have `block_size` tokens, counted from the document's begin; a query sees its own block causally. Blocks that
    a query can't see are no candidates, so that they use up no choice. One softmax runs over all tokens that are seen,
    and gradients flow through it alone, not through the choice. A subclass defines `score`.

    The choice depends on q and k of tokens up to the query only: a text that is decoded attends as one that is read at
    once. Keys of all earlier tokens are read for each choice, also while decoding.
    """

    block_size: int
    top_k: int

    def __post_init__(self) -> None:
        require_positive(self, block_size=self.block_size, top_k=self.top_k)

    @abstractmethod
    def score(self, q_BGLD: Tensor, keys_BNMD: Tensor) -> Tensor:
        """Return the score of each block for each query, [B, G, L, N], or [B, 1, L, N] where the heads choose together.

        Called for the query heads of one key-value head at a time, in fp32 (fp64 for fp64), without gradients.
        """

    def attend(self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, call: Call) -> Tensor:
        rows = call.rows
        blocks, own_BS = Blocks.of_tokens(rows, self.block_size), rows.positions_BS // self.block_size
        slots_BS, chosen_BHLN = blocks.slots(k_BKSD.shape[2]), self._choose(q_BHLD, k_BKSD, blocks, rows)

        def own_or_chosen(b: Any, h: Any, q: Any, kv: Any) -> Any:
            query = (q - rows.first_query).clamp(min=0)  # kernels may ask beyond the queries
            return (own_BS[b, q] == own_BS[b, kv]) | chosen_BHLN[b, h, query, slots_BS[b, kv]]

        return call.over(own_or_chosen, q_BHLD, k_BKSD, v_BKSD)

    @torch.no_grad()
    def _choose(self, q_BHLD: Tensor, k_BKSD: Tensor, blocks: Blocks, rows: Rows) -> Tensor:
        """Return which blocks each query chooses, [B, H, L, N + 1]; the last entry, of no block, is False."""
        candidates_BLN = self._candidates(blocks, rows)
        dtype = torch.promote_types(q_BHLD.dtype, torch.float32)
        chosen = []
        with torch.autocast(q_BHLD.device.type, enabled=False):
            for q_BGLD, k_B1SD in zip(q_BHLD.chunk(k_BKSD.shape[1], 1), k_BKSD.split(1, 1), strict=True):
                scores_BGLN = self.score(q_BGLD.to(dtype), blocks.take(k_B1SD)[:, 0].to(dtype))
                picked_BGLN = self._best(scores_BGLN, candidates_BLN[:, None])
                chosen.append(picked_BGLN.expand(-1, q_BGLD.shape[1], -1, -1))
        return F.pad(torch.cat(chosen, 1), (0, 1))

    def _candidates(self, blocks: Blocks, rows: Rows) -> Tensor:
        """Return which blocks are earlier ones of a query's document, [B, L, N]."""
        queries = slice(rows.first_query, rows.first_query + rows.num_queries)
        own_BL1 = rows.positions_BS[:, queries, None] // self.block_size
        together_BLN = rows.documents_BS[:, queries, None] == blocks.documents_BN[:, None]
        return together_BLN & (blocks.numbers_BN[:, None] < own_BL1) & blocks.complete_BN[:, None]

    def _best(self, scores: Tensor, candidates: Tensor) -> Tensor:
        best = scores.masked_fill(~candidates, float("-inf")).topk(min(self.top_k - 1, scores.shape[-1])).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & candidates

    def parts(self, layout: Layout) -> Sequence[tuple[Cost, int]]:
        position = torch.arange(layout.length)
        num_earlier = position // self.block_size
        seen = position % self.block_size + 1 + num_earlier.clamp(max=self.top_k - 1) * self.block_size
        # A score is one product of q with a vector, half of what a key takes.
        return [(Cost(keys=float((seen + num_earlier / 2).mean())), layout.num_attention_heads)]

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:
        refuse_own_window(self, config)
