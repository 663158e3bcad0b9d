"""A deployed head pattern: retrieval heads attend in full, streaming heads to sinks and recent tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lctrain.attention.base import Attention, Layout, MaskedAttention, Run
from lctrain.attention.full import FullAttention
from lctrain.attention.streaming import StreamingAttention
from lctrain.heads import HeadPattern


@dataclass(frozen=True, kw_only=True)
class HeadPatternAttention(Attention):
    """What DuoAttention deploys (Xiao et al., arXiv:2410.10819, §2.4): each head either retrieves or streams.

    Heads are split, and each pattern runs at its own cost. `path` is a pattern's JSON, TSV or an exported folder.
    What is not null replaces what the file says: which heads stream, by the `threshold` of their gates or by the
    `streaming_share` of all heads, and what those keep.
    """

    path: str
    threshold: float | None
    streaming_share: float | None
    num_sink_tokens: int | None
    recent_size: int | None

    @cached_property
    def pattern(self) -> HeadPattern:
        """Read once, when it is asked for. InputError if there is none."""
        return HeadPattern.read(self.path).deployed(
            threshold=self.threshold,
            streaming_share=self.streaming_share,
            num_sink_tokens=self.num_sink_tokens,
            recent_size=self.recent_size,
        )

    @cached_property
    def streaming(self) -> MaskedAttention:
        """What streaming heads see."""
        return StreamingAttention(num_sink_tokens=self.pattern.num_sink_tokens, recent_size=self.pattern.recent_size)

    def attend(
        self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, layout: Layout, run: Run
    ) -> Tensor:
        num_kv_heads = k_BKSD.shape[1]
        width = q_BHLD.shape[1] // num_kv_heads  # query heads that share a key-value head here
        by_head = q_BHLD.split(width, 1), k_BKSD.split(1, 1), v_BKSD.split(1, 1)
        out: dict[int, Tensor] = {}
        for pattern, heads in self._assignment(layout, [layout.first_head + i * width for i in range(num_kv_heads)]):
            q, k, v = (torch.cat([x[head] for head in heads], dim=1) for x in by_head)
            out |= zip(heads, run(pattern, q, k, v).split(width, 1), strict=True)
        return torch.cat([out[head] for head in range(num_kv_heads)], dim=1)

    def parts(self, layout: Layout) -> Sequence[tuple[MaskedAttention, int]]:
        width = layout.num_attention_heads // layout.num_key_value_heads
        assignment = self._assignment(layout, range(0, layout.num_attention_heads, width))
        return [(pattern, len(heads) * width) for pattern, heads in assignment]

    def _assignment(self, layout: Layout, query_heads: Sequence[int]) -> list[tuple[MaskedAttention, list[int]]]:
        """The patterns that some of the heads run, which are given by their (global) query heads, and which of them."""
        width = layout.num_attention_heads // layout.num_key_value_heads
        retrieves = self.pattern.retrieval_heads[layout.layer_idx].tolist()
        chosen = [retrieves[head // width] for head in query_heads]
        patterns = ((FullAttention(), True), (self.streaming, False))
        return [(p, [i for i, full in enumerate(chosen) if full == kind]) for p, kind in patterns if kind in chosen]

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:
        self.pattern.check(config, lengths[-1])
