"""Streaming attention: sinks and a recent window."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from lctrain.attention.base import Layout, MaskedAttention, require_positive
from lctrain.errors import InputError
from lctrain.kernels.mask import Local, PositionMask


@dataclass(frozen=True, kw_only=True)
class StreamingAttention(MaskedAttention):
    """Each token sees the document's first `num_sink_tokens` and the last `recent_size`, itself included.

    Xiao et al., arXiv:2309.17453. Deviation: rotary positions stay those of the text instead of those in the cache,
    as in DuoAttention (arXiv:2410.10819), so that training and prefill are one pass.
    """

    num_sink_tokens: int
    recent_size: int

    def __post_init__(self) -> None:
        require_positive(self, recent_size=self.recent_size)
        if self.num_sink_tokens < 0:
            raise InputError(f"attention.num_sink_tokens must not be negative, got {self.num_sink_tokens}")

    def visible(self, layout: Layout) -> PositionMask:
        return lambda b, h, q_pos, kv_pos: (kv_pos < self.num_sink_tokens) | (q_pos - kv_pos < self.recent_size)

    def local(self, layout: Layout, head: int) -> Local:
        return Local(window=self.recent_size, num_sinks=self.num_sink_tokens)

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:
        if self.num_sink_tokens + self.recent_size > lengths[-1]:
            raise InputError(
                f"attention.num_sink_tokens + attention.recent_size = {self.num_sink_tokens + self.recent_size} "
                f"is longer than the longest sequence ({lengths[-1]}); use attention=full"
            )
