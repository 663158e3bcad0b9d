"""Keep every key and value of every head.

Shape legend: B batch, H query heads, K key-value heads, L new tokens, D head dim.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lctrain.cache.base import CachePolicy, Forward, Store
from lctrain.cache.layer import CacheLayer, Part, is_installed
from lctrain.decode.one_query import Buffer

MIN_ROOM = 64  # tokens: the least that a full buffer grows by


class AllKeys(Store):
    """A store whose buffers have room for more tokens, so that a new token does not copy all earlier ones."""

    forgets: ClassVar[bool] = False
    decides: ClassVar[bool] = False

    def __init__(self, reserve: int | None = None) -> None:
        super().__init__()
        self._reserve = reserve or 0

    def attend(self, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, start: int, forward: Forward) -> Tensor:
        stop = start + k_BKLD.shape[2]
        keys, values = self._buffers(k_BKLD, start, stop)
        keys[:, :, start:stop], values[:, :, start:stop] = k_BKLD, v_BKLD
        return forward.attend(q_BHLD, keys[:, :, :stop], values[:, :, :stop])

    def buffer(self, like_BKLD: Tensor, start: int) -> Buffer:
        keys, values = self._buffers(like_BKLD, start, start + 1)
        return Buffer(keys, values, keys.shape[2] - 1)

    def _buffers(self, like_BKLD: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        self.keys = self._with_room(self.keys, like_BKLD, start, stop)
        self.values = self._with_room(self.values, like_BKLD, start, stop)
        return self.keys, self.values

    def _with_room(self, buffer: Tensor | None, new_BKLD: Tensor, start: int, stop: int) -> Tensor:
        if buffer is not None and buffer.shape[2] >= stop:
            return buffer
        room = self._reserve if buffer is None else max(stop + MIN_ROOM, stop * 5 // 4)
        larger = new_BKLD.new_empty(*new_BKLD.shape[:2], max(stop, room), new_BKLD.shape[3])
        if buffer is not None:
            larger[:, :, :start] = buffer[:, :, :start]
        return larger

    def crop(self, length: int) -> None:
        """Do nothing: tokens from `length` on are overwritten before any query sees them."""

    @property
    def room(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]


@dataclass(frozen=True, kw_only=True)
class FullCache(CachePolicy):
    """A policy that keeps the whole context, even where the installed method sees only a part.

    Layers with a window or a state of their own, and models that attend without lctrain, use transformers' caches.
    """

    decides: ClassVar[bool] = False

    def new(self, model: PreTrainedModel, length: int | None = None) -> Cache:
        layers = DynamicCache(config=model.config.get_text_config()).layers
        if not is_installed(model):
            return Cache(layers)
        return Cache([_own(length) if type(layer) is DynamicLayer else layer for layer in layers])

    def num_bytes(self, config: PreTrainedConfig, length: int, batch_size: int, dtype: torch.dtype) -> int:
        text = config.get_text_config()
        num_heads = int(text.num_hidden_layers * text.num_key_value_heads)
        return num_heads * length * bytes_per_key(config, batch_size, dtype)


def _own(length: int | None) -> CacheLayer:
    return CacheLayer([Part(AllKeys(length), None)])


def bytes_per_key(config: PreTrainedConfig, batch_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one token's key and value in one head of one layer, over all rows of the batch."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * batch_size * int(head_dim) * dtype.itemsize
