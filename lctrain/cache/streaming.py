"""Keep sinks and recent tokens only, in every head."""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from lctrain.cache.base import CachePolicy
from lctrain.cache.full import bytes_per_key
from lctrain.cache.layer import CacheLayer, Part, require_full_layers, require_installed
from lctrain.cache.ring import Ring, Slots
from lctrain.cache.rotation import Rotation, require_fixed_frequencies
from lctrain.errors import InputError

Positions = Literal["text", "cache"]


@dataclass(frozen=True, kw_only=True)
class StreamingCache(CachePolicy):
    """StreamingLLM (Xiao et al., arXiv:2309.17453): a row's first `num_sink_tokens` and last `recent_size` tokens.

    `positions: cache` counts positions inside the cache, as the paper does; `text` leaves every token at its position
    in the text, as attention=streaming and DuoAttention do. Distances to recent tokens are the same in both.
    """

    num_sink_tokens: int
    recent_size: int
    positions: Positions

    def __post_init__(self) -> None:
        if self.num_sink_tokens < 0 or self.recent_size < 1:
            raise InputError(
                f"a streaming cache needs num_sink_tokens of at least 0 and recent_size of at least 1, "
                f"not {self.num_sink_tokens} and {self.recent_size}"
            )
        check_positions(self.positions)

    def new(self, model: PreTrainedModel, length: int | None = None) -> Cache:
        self.check(model.config, length)
        require_installed(model)
        rotation = Rotation(model) if self.positions == "cache" else None
        slots = Slots(self.num_sink_tokens, self.recent_size)
        num_layers = model.config.get_text_config().num_hidden_layers
        return Cache([CacheLayer([Part(Ring(slots, rotation), None)]) for _ in range(num_layers)])

    def num_bytes(self, config: PreTrainedConfig, length: int, batch_size: int, dtype: torch.dtype) -> int:
        text = config.get_text_config()
        num_heads = text.num_hidden_layers * text.num_key_value_heads
        return int(num_heads * streaming_bytes(config, self.num_sink_tokens, self.recent_size, batch_size, dtype))

    def check(self, config: PreTrainedConfig, length: int | None = None) -> None:
        require_full_layers(config)
        if self.positions == "cache":
            require_fixed_frequencies(config)
        if length is not None and self.num_sink_tokens + self.recent_size >= length:
            raise InputError(
                f"cache.num_sink_tokens + cache.recent_size = {self.num_sink_tokens + self.recent_size} "
                f"is all of {length} tokens; use cache=full"
            )


def check_positions(positions: str) -> None:
    """Raise InputError unless `positions` is text or cache."""
    if positions not in ("text", "cache"):
        raise InputError(f"cache.positions={positions} is neither text nor cache")


def streaming_bytes(
    config: PreTrainedConfig, num_sink_tokens: int, recent_size: int, batch_size: int, dtype: torch.dtype
) -> int:
    """Return the bytes of one head of one layer, for a row of any length."""
    return (num_sink_tokens + recent_size) * bytes_per_key(config, batch_size, dtype)
