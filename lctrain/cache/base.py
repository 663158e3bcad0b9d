"""The interface of a cache policy, and how a long prompt is read in chunks.

Shape legend: B batch, H query heads, K key-value heads, L new tokens, S all tokens of the row so far, D head dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from lctrain.cache.state import State
from lctrain.errors import InputError
from lctrain.kernels.base import Kernel
from lctrain.kernels.one_query import Buffer


class CachePolicy(ABC):
    """What is kept of the keys and values before, and what of it is attended: makes caches for `generate`."""

    keeps_all: ClassVar[bool] = False  # nothing is forgotten: any attention method may attend, not full attention alone

    @abstractmethod
    def new(self, model: PreTrainedModel, length: int | None = None) -> Cache:
        """An empty cache: `model.generate(…, past_key_values=policy.new(model))`.

        `length`: tokens of a row to reserve memory for; without it memory grows, and is at most a quarter too much.
        Raises InputError if the policy can't serve this model.
        """

    @abstractmethod
    def num_bytes(self, config: PreTrainedConfig, length: int, batch_size: int, dtype: torch.dtype) -> int:
        """What a cache that was made for `length` tokens holds, from the first token on."""

    def check(self, config: PreTrainedConfig, length: int | None = None) -> None:  # noqa: B027 - most fit always
        """Raise InputError if the policy does not fit the model, or rows of this length."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """What a layer's cache is told of the forward that asks it."""

    tokens_BS: Tensor | None  # False where a row is padded; None: nowhere
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]  # (q, all keys, all values) by the installed method
    kernel: Kernel
    scaling: float
    plain: bool  # each query sees every key up to its own, without a softcap
    shared: dict[Any, Any]  # by all layers of the forward: what was prepared for one serves the others


class Store(State, ABC):
    """What some heads of one layer keep, keys, values and more: a policy is a way to store and to attend.

    `keys` and `values` are buffers [B, K, ≥ kept, D]. Any other tensor that a store keeps begins with the batch too:
    beams select rows of all of them, and a reset brings every attribute back to what it was before the first token.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __init_subclass__(cls) -> None:
        """Leave `buffer` and `crop` of a base behind where `attend` is the class's own: they know only the base's."""
        super().__init_subclass__()
        if "attend" in vars(cls):
            for name in {"buffer", "crop"} - vars(cls).keys():
                setattr(cls, name, getattr(Store, name))

    @abstractmethod
    def attend(self, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, start: int, forward: Forward) -> Tensor:
        """[B, H, L, D] of new queries over what was kept and the new keys; keeps of those what later ones need.

        `start` is how many tokens of the row came before.
        """

    def buffer(self, like_BKLD: Tensor, start: int) -> Buffer | None:
        """With room for one token behind so many; None where a token takes more than to be stored and see all."""
        return None

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on. Without it tokens can't be taken back."""
        raise NotImplementedError

    @property
    def can_crop(self) -> bool:
        """Whether the last tokens can be taken back."""
        return self.keeps_all and type(self).crop is not Store.crop

    @property
    def room(self) -> float:
        """How many tokens fit before a buffer must grow."""
        return inf

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is forgotten: any method may attend."""
        return False


@torch.no_grad()
def prefill(
    model: PreTrainedModel, input_ids_BS: Tensor, attention_mask_BS: Tensor | None, cache: Cache, chunk_size: int | None
) -> None:
    """Put all tokens but the last one into `cache`, `chunk_size` at a time (None: all at once), computing no logits.

    `model.generate(input_ids, attention_mask=…, past_key_values=cache)` goes on from there. What `cache` already holds
    is taken for the first tokens of `input_ids`.
    """
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"prefill_chunk_size={chunk_size} must be positive")
    end = input_ids_BS.shape[1] - 1
    chunk_size = chunk_size or max(1, end)
    for start in range(cache.get_seq_length(), end, chunk_size):
        stop = min(start + chunk_size, end)
        mask = None if attention_mask_BS is None else attention_mask_BS[:, :stop]
        positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)[:, start:]
        model.get_decoder()(
            input_ids_BS[:, start:stop], attention_mask=mask, position_ids=positions, past_key_values=cache
        )
