"""Recent tokens as they are, and everything before them as pooled summaries of segments.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, N segments of a level, M members of a
segment, E summaries of all levels, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lctrain.attention.base import Attention, Call, Cost, Extra, Layout, Rows, require_positive
from lctrain.attention.blocks import Blocks, refuse_own_window
from lctrain.errors import InputError
from lctrain.kernels.mask import IndexMask

QUERIES = "queries"  # the parameter of a child module, [levels, key-value heads, D]


@dataclass(frozen=True, kw_only=True)
class SegmentAttention(Attention):
    """One softmax over recent tokens and summaries of closed segments, in two levels, three, or more.

    Segments have `segment_sizes` tokens, counted from the document's begin; those of a level are made of whole ones of
    the level before (tokens, sentences, documents). A query at position p sees every token up to itself once:

        h₁ = ⌊max(0, p + 1 − recent_size) / size₁⌋ · size₁,   hₗ₊₁ = ⌊hₗ / sizeₗ₊₁⌋ · sizeₗ₊₁

    tokens from h₁ to p as they are, those from hₗ₊₁ to hₗ in summaries of level l, and all before the last h in the
    coarsest. So at least `recent_size` tokens are seen as they are, itself included. A segment closes when its last
    token is none of the last `recent_size`, and is absorbed as soon as a coarser segment is full of closed ones.

    A summary is the mean of its members' keys (rotated, as the kernel reads them) and values. `pooling` "attention"
    weighs them by softmax(u · key / √D) instead, with a learned u per level and key-value head, which begins at 0: the
    mean. A summary of n tokens has n times the weight of a token with its key (+ log n on its score), so that it keeps
    the mass of what it stands for.

    No kernel here adds to scores. So the weights n multiply values and the softmax's denominator: without them, two
    calls give Σ p n v and Σ p n, and their quotient is exactly attention with them, on every kernel and for every head
    dimension, also where scores are capped. It costs each key twice. One call would do with another head dimension
    that holds log n, but kernels take certain dimensions only (FlashAttention-4: 64, 96, 128, 256).

    Keys and values of all tokens are kept and pooled anew in every forward: a cache is as large as for full attention.
    """

    segment_sizes: Sequence[int]
    recent_size: int
    pooling: Literal["mean", "attention"]

    def __post_init__(self) -> None:
        require_positive(self, recent_size=self.recent_size)
        if not self.segment_sizes or self.segment_sizes[0] < 1:
            raise InputError(f"attention.segment_sizes={self.segment_sizes} must be positive numbers of tokens")
        if any(large <= small or large % small for small, large in pairwise(self.segment_sizes)):
            raise InputError(f"attention.segment_sizes={self.segment_sizes}: each must be a multiple of the one before")
        if self.pooling not in ("mean", "attention"):
            raise InputError(f"attention.pooling={self.pooling} must be mean or attention")

    def attend(self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, call: Call) -> Tensor:
        rows, queries = call.rows, self._pooling_queries(module, q_BHLD, k_BKSD, call.layout)
        levels, horizons = self._levels(rows), self._horizons(rows.positions_BS)

        def as_it_is(b, h, q, kv):  # type: ignore[no-untyped-def]
            return rows.positions_BS[b, kv] >= horizons[0][b, q]

        if not levels[0].numbers_BN.numel():  # no row has room for a segment
            return call.over(as_it_is, q_BHLD, k_BKSD, v_BKSD)
        visible = _in_summaries(levels, self.segment_sizes, horizons, rows)
        keys_BKED, values_BKED = self._summaries(levels, queries, k_BKSD, v_BKSD)
        sizes_E1 = self._num_tokens(levels, v_BKSD)[:, None]

        def summed(of_tokens: Tensor, of_summaries: Tensor) -> Tensor:
            extra = Extra(k_BKED=keys_BKED, v_BKED=of_summaries, visible=visible)
            return call.over(as_it_is, q_BHLD, k_BKSD, of_tokens, extra)

        weighted = summed(v_BKSD, values_BKED * sizes_E1)
        return weighted / summed(torch.ones_like(v_BKSD), sizes_E1.expand_as(values_BKED))[..., :1]

    def _levels(self, rows: Rows) -> list[Blocks]:
        """Return the segments of each level that are whole; members of those of the first are tokens."""
        key = (type(self), *self.segment_sizes)
        if key not in rows.shared:
            levels = [Blocks.of_tokens(rows, self.segment_sizes[0])]
            for small, large in pairwise(self.segment_sizes):
                levels.append(levels[-1].groups(large // small))
            rows.shared[key] = levels
        found: list[Blocks] = rows.shared[key]
        return found

    def _horizons(self, position: Tensor) -> list[Tensor]:
        """Return h₁, h₂, … of queries at these positions, and 0, where the coarsest level begins."""
        horizons = [(position + 1 - self.recent_size).clamp(min=0)]
        for size in self.segment_sizes:
            horizons.append(horizons[-1] // size * size)
        return [*horizons[1:], torch.zeros_like(position)]

    def _summaries(
        self, levels: list[Blocks], queries: Sequence[Tensor | None], k_BKSD: Tensor, v_BKSD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the summaries of all levels, [B, K, E, D]."""
        keys, values = [k_BKSD], [v_BKSD]
        for segments, query_KD in zip(levels, queries, strict=True):
            k_BKND, v_BKND = _pooled(segments.take(keys[-1]), segments.take(values[-1]), query_KD)
            keys.append(k_BKND)
            values.append(v_BKND)
        return torch.cat(keys[1:], 2), torch.cat(values[1:], 2)

    def _num_tokens(self, levels: list[Blocks], v_BKSD: Tensor) -> Tensor:
        """Return how many tokens each summary stands for, [E]."""
        sizes = zip(levels, self.segment_sizes, strict=True)
        return torch.cat([v_BKSD.new_full(level.numbers_BN.shape[1:], size) for level, size in sizes])

    def _pooling_queries(
        self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, layout: Layout
    ) -> Sequence[Tensor | None]:
        """Return the learned queries of each level for the key-value heads that are here, [K, D]; None for the mean."""
        if not self.learns:
            return [None] * len(self.segment_sizes)
        num_here = k_BKSD.shape[1]
        first_queries = torch.arange(num_here, device=k_BKSD.device) * (q_BHLD.shape[1] // num_here)
        heads = (layout.first_head + first_queries) * layout.num_key_value_heads // layout.num_attention_heads
        return module.get_parameter(f"{self.name}.{QUERIES}")[:, heads].to(k_BKSD.dtype).unbind(0)

    @property
    def learns(self) -> bool:
        return self.pooling == "attention"

    def child(self, config: PreTrainedConfig, layout: Layout) -> nn.Module | None:
        if not self.learns:
            return None
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        pooling = nn.Module()
        shape = (len(self.segment_sizes), config.num_key_value_heads, head_dim)
        pooling.register_parameter(QUERIES, nn.Parameter(torch.zeros(shape, dtype=torch.float32)))
        return pooling

    def parts(self, layout: Layout) -> Sequence[tuple[Cost, int]]:
        position = torch.arange(layout.length)
        horizons = self._horizons(position)
        seen = (position + 1 - horizons[0]).double()
        for size, (later, earlier) in zip(self.segment_sizes, pairwise(horizons), strict=True):
            seen += (later - earlier) / size
        return [(Cost(keys=float(seen.mean())), layout.num_attention_heads)] * 2  # values, then the denominator

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:
        refuse_own_window(self, config)


def _pooled(k_BKNMD: Tensor, v_BKNMD: Tensor, query_KD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the summaries' keys and values, [B, K, N, D], weighted by `query_KD` if there is one."""
    if query_KD is None:
        return k_BKNMD.mean(3), v_BKNMD.mean(3)
    scores_BKNM = torch.einsum("bknmd,kd->bknm", k_BKNMD, query_KD * query_KD.shape[-1] ** -0.5)
    weights_BKNM1 = scores_BKNM.float().softmax(-1).to(k_BKNMD.dtype)[..., None]
    return (weights_BKNM1 * k_BKNMD).sum(3), (weights_BKNM1 * v_BKNMD).sum(3)


def _in_summaries(levels: list[Blocks], sizes: Sequence[int], horizons: list[Tensor], rows: Rows) -> IndexMask:
    """Return which queries see which summaries."""
    begins_BE = torch.cat([level.numbers_BN * size for level, size in zip(levels, sizes, strict=True)], 1)
    documents_BE = torch.cat([level.documents_BN.where(level.complete_BN, -1) for level in levels], 1)
    level_E = torch.cat([torch.full_like(level.numbers_BN[0], i) for i, level in enumerate(levels)])
    horizons_BSl = torch.stack(horizons, -1)

    def visible(b, h, q, e):  # type: ignore[no-untyped-def]
        closed = begins_BE[b, e] < horizons_BSl[b, q, level_E[e]]  # both are multiples of the level's size
        absorbed = begins_BE[b, e] < horizons_BSl[b, q, level_E[e] + 1]
        return closed & ~absorbed & (documents_BE[b, e] == rows.documents_BS[b, q])

    return visible
