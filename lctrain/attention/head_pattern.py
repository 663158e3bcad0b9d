"""A deployed head pattern: retrieval heads attend in full, streaming heads to sinks and recent tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn
from transformers import PreTrainedConfig

from lctrain.attention.base import Attention, Call, Layout, MaskedAttention
from lctrain.attention.by_head import PatternOf, attend_by_head, parts_by_head
from lctrain.attention.full import FullAttention
from lctrain.attention.streaming import StreamingAttention
from lctrain.heads import HeadPattern


@dataclass(frozen=True, kw_only=True)
class HeadPatternAttention(Attention):
    """What DuoAttention deploys (Xiao et al., arXiv:2410.10819, §2.4): each head either retrieves or streams.

    Full and streaming attention run at their own costs. `path` is a pattern's JSON, TSV or an exported folder. Options
    that are not null replace what the file says: which heads stream, by the `threshold` of their gates or by the
    `streaming_share` of all heads, and what those keep.
    """

    path: str
    threshold: float | None
    streaming_share: float | None
    num_sink_tokens: int | None
    recent_size: int | None

    @cached_property
    def pattern(self) -> HeadPattern:
        """Return the deployed pattern, read from `path` at the first use. Raises InputError if there is none."""
        return HeadPattern.read(self.path).deployed(
            threshold=self.threshold,
            streaming_share=self.streaming_share,
            num_sink_tokens=self.num_sink_tokens,
            recent_size=self.recent_size,
        )

    @cached_property
    def streaming(self) -> MaskedAttention:
        """Return the pattern of streaming heads."""
        return StreamingAttention(num_sink_tokens=self.pattern.num_sink_tokens, recent_size=self.pattern.recent_size)

    def attend(self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, call: Call) -> Tensor:
        return attend_by_head(self._patterns(call.layout.layer_idx), q_BHLD, k_BKSD, v_BKSD, call)

    def parts(self, layout: Layout) -> Sequence[tuple[MaskedAttention, int]]:
        return parts_by_head(self._patterns(layout.layer_idx), layout)

    def _patterns(self, layer_idx: int) -> PatternOf:
        retrieves = self.pattern.retrieval_heads[layer_idx].tolist()
        return lambda kv_head: FullAttention() if retrieves[kv_head] else self.streaming

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:
        self.pattern.check(config, lengths[-1])
