"""Sliding window attention."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from lctrain.attention.base import Layout, MaskedAttention, require_positive
from lctrain.errors import InputError
from lctrain.kernels.mask import Local, PositionMask


@dataclass(frozen=True, kw_only=True)
class SlidingWindowAttention(MaskedAttention):
    """Each token sees itself and the `sliding_window - 1` tokens before it (Beltagy et al., arXiv:2004.05150, §3.1).

    `sliding_window` is one width in tokens for all layers, or a list with one per layer. The width counts as in
    transformers, whose own window it replaces where the model has one.
    """

    sliding_window: int | Sequence[int]

    def __post_init__(self) -> None:
        for width in self._widths():
            require_positive(self, sliding_window=width)

    def visible(self, layout: Layout) -> PositionMask:
        width = self.layer_group(layout.layer_idx)
        return lambda b, h, q_pos, kv_pos: q_pos - kv_pos < width

    def local(self, layout: Layout, head: int) -> Local | None:
        return Local(window=self.layer_group(layout.layer_idx))

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:
        if not isinstance(self.sliding_window, int) and len(self.sliding_window) != config.num_hidden_layers:
            raise InputError(
                f"attention.sliding_window lists {len(self.sliding_window)} widths, "
                f"but the model has {config.num_hidden_layers} layers"
            )
        if max(self._widths()) > lengths[-1]:
            raise InputError(
                f"attention.sliding_window={max(self._widths())} is wider than the longest sequence ({lengths[-1]}); "
                "use attention=full"
            )

    def layer_group(self, layer_idx: int) -> int:
        return self.sliding_window if isinstance(self.sliding_window, int) else self.sliding_window[layer_idx]

    def adapt_config(self, config: PreTrainedConfig) -> str | None:
        own = getattr(config, "sliding_window", None)
        if own is None:
            return None
        config.sliding_window = max(self._widths())
        return f"the model's own window of {own} tokens is replaced by {self.sliding_window}"

    def _widths(self) -> Sequence[int]:
        return [self.sliding_window] if isinstance(self.sliding_window, int) else self.sliding_window
