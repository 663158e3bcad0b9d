"""Keep everything in retrieval heads, and sinks and recent tokens in streaming heads."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from lctrain.cache.base import CachePolicy
from lctrain.cache.full import AllKeys, bytes_per_key
from lctrain.cache.layer import CacheLayer, Part, require_full_layers, require_installed
from lctrain.cache.ring import Ring, Slots
from lctrain.cache.rotation import Rotation, require_fixed_frequencies
from lctrain.cache.streaming import Positions, check_positions, streaming_bytes
from lctrain.heads import HeadPattern


@dataclass(frozen=True, kw_only=True)
class DuoCache(CachePolicy):
    """DuoAttention's two caches (Xiao et al., arXiv:2410.10819, §2.4), for the heads of `pattern`.

    `positions` are those of streaming heads, with the same choices as in cache=streaming; the paper uses `text`.
    Deviation: each token of a chunk sees its own sinks and window, so that any chunk size gives the same result; the
    authors' prefill attends in full inside a chunk.
    """

    pattern: HeadPattern
    positions: Positions

    def __post_init__(self) -> None:
        check_positions(self.positions)

    def new(self, model: PreTrainedModel, length: int | None = None) -> Cache:
        self.check(model.config, length)
        require_installed(model)
        rotation = Rotation(model) if self.positions == "cache" else None
        slots = Slots(self.pattern.num_sink_tokens, self.pattern.recent_size)

        def layer(retrieves_K: Tensor) -> CacheLayer:
            stores = ((AllKeys(length), retrieves_K), (Ring(slots, rotation), ~retrieves_K))
            return CacheLayer(
                [Part(store, chosen.nonzero()[:, 0].to(model.device)) for store, chosen in stores if chosen.any()]
            )

        return Cache([layer(retrieves_K) for retrieves_K in self.pattern.retrieval_heads])

    def num_bytes(self, config: PreTrainedConfig, length: int, batch_size: int, dtype: torch.dtype) -> int:
        retrieves = self.pattern.retrieval_heads
        num_retrieving = int(retrieves.sum())
        streaming = streaming_bytes(config, self.pattern.num_sink_tokens, self.pattern.recent_size, batch_size, dtype)
        full = length * bytes_per_key(config, batch_size, dtype)
        return num_retrieving * full + (retrieves.numel() - num_retrieving) * streaming

    def check(self, config: PreTrainedConfig, length: int | None = None) -> None:
        require_full_layers(config)
        if self.positions == "cache":
            require_fixed_frequencies(config)
        self.pattern.check(config, length)
