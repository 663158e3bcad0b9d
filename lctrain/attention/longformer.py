"""Longformer's window and global tokens."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from lctrain.attention.base import Layout, MaskedAttention, require_positive
from lctrain.errors import InputError
from lctrain.kernels.mask import PositionMask


@dataclass(frozen=True, kw_only=True)
class Longformer(MaskedAttention):
    """A dilated sliding window, and a prefix that every token sees (Beltagy et al., arXiv:2004.05150, §3.1).

    Each token sees every `dilation`-th of the `sliding_window · dilation` tokens up to itself, `sliding_window` in all,
    and the document's first `num_global_tokens`. Deviation: the paper's global tokens also see what comes after them;
    a causal model's can't.
    """

    sliding_window: int
    num_global_tokens: int
    dilation: int

    def __post_init__(self) -> None:
        require_positive(self, sliding_window=self.sliding_window, dilation=self.dilation)
        if self.num_global_tokens < 0:
            raise InputError(f"attention.num_global_tokens must not be negative, got {self.num_global_tokens}")

    def visible(self, layout: Layout) -> PositionMask:
        span = self.sliding_window * self.dilation

        def near_or_global(b, h, q_pos, kv_pos):  # type: ignore[no-untyped-def]
            distance = q_pos - kv_pos
            return ((distance < span) & (distance % self.dilation == 0)) | (kv_pos < self.num_global_tokens)

        return near_or_global

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:
        reach = self.sliding_window * self.dilation + self.num_global_tokens
        if reach > lengths[-1]:
            raise InputError(
                f"attention.sliding_window · dilation + num_global_tokens = {reach} is longer than the longest "
                f"sequence ({lengths[-1]}); use attention=full"
            )
