"""Every key and value of every head."""

from dataclasses import dataclass

from transformers import Cache, DynamicCache, PreTrainedModel

from lctrain.cache.base import CachePolicy


@dataclass(frozen=True, kw_only=True)
class FullCache(CachePolicy):
    """What transformers keeps by itself: all of the context, but for layers with a sliding window of their own."""

    def new(self, model: PreTrainedModel) -> Cache:
        return DynamicCache(config=model.config)
