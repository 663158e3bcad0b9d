"""Define the interface of a cache policy, and read a long prompt in chunks.

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
from lctrain.decode.one_query import Buffer
from lctrain.errors import InputError
from lctrain.kernels.base import Kernel


class CachePolicy(ABC):
    """A policy that decides which earlier keys and values are kept and attended, and makes caches for `generate`."""

    decides: ClassVar[bool] = True  # False: the attention method decides what is seen, and need not be full attention
    forgets_between_forwards: ClassVar[bool] = False  # True: a row that is read in one forward is seen in full

    @abstractmethod
    def new(self, model: PreTrainedModel, length: int | None = None) -> Cache:
        """Return an empty cache, for `model.generate(…, past_key_values=policy.new(model))`.

        Memory is reserved for rows of `length` tokens; without `length` it grows, and is at most a quarter too much.
        Raises InputError if the policy can't serve this model.
        """

    @abstractmethod
    def num_bytes(self, config: PreTrainedConfig, length: int, batch_size: int, dtype: torch.dtype) -> int:
        """Return the bytes that a cache made for `length` tokens takes when it has read them; never are they more."""

    def check(self, config: PreTrainedConfig, length: int | None = None) -> None:  # noqa: B027 - most fit always
        """Raise InputError if the policy does not fit the model, or rows of this length."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The properties of one forward, passed to the cache of each layer."""

    tokens_BS: Tensor | None  # False where a row is padded; None: no padding
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]  # (q, all keys, all values), computed by the installed method
    kernel: Kernel
    scaling: float
    plain: bool  # each query sees every key up to its own, without a softcap
    shared: dict[Any, Any]  # among all layers of the forward: results that one layer prepares and the others use


class Store(State, ABC):
    """The keys, values and other tensors that some heads of one layer keep, and how these heads attend.

    `keys` and `values` are buffers [B, K, ≥ kept, D]. Any other tensor that a store keeps begins with the batch too:
    beams select rows of all of them, and a reset restores every attribute to its state before the first token.

    A store declares two attributes. `forgets`: whether it drops tokens, which can't be brought back then. `decides`:
    whether it decides which kept tokens are seen; where it does not, the installed attention method does.
    """

    forgets: ClassVar[bool] = True
    decides: ClassVar[bool] = True

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __init_subclass__(cls) -> None:
        """Replace a base's `buffer` and `crop` by those of `Store` in a class that defines `attend` without them.

        A base's `buffer` and `crop` are right for the base's `attend` only.
        """
        super().__init_subclass__()
        if "attend" in vars(cls):
            for name in {"buffer", "crop"} - vars(cls).keys():
                setattr(cls, name, getattr(Store, name))

    @abstractmethod
    def attend(self, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, start: int, forward: Forward) -> Tensor:
        """Return the output [B, H, L, D] of the new queries over kept and new keys, and keep what later queries need.

        `start` is the number of earlier tokens in the row.
        """

    def buffer(self, like_BKLD: Tensor, start: int) -> Buffer | None:
        """Return the buffer with room for one token after `start` tokens, in which that token sees everything.

        None where a token needs more than being stored and attending to all.
        """
        return None

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on. A store that does not define this can't take tokens back."""
        raise NotImplementedError

    @property
    def can_crop(self) -> bool:
        """Return whether the last tokens can be taken back."""
        return not self.forgets and type(self).crop is not Store.crop

    @property
    def room(self) -> float:
        """Return the number of tokens that fit before a buffer must grow."""
        return inf


@torch.no_grad()
def prefill(
    model: PreTrainedModel, input_ids_BS: Tensor, attention_mask_BS: Tensor | None, cache: Cache, chunk_size: int | None
) -> None:
    """Put all tokens but the last one into `cache`, `chunk_size` at a time (None: all at once), computing no logits.

    `model.generate(input_ids, attention_mask=…, past_key_values=cache)` continues from there. Tokens already in `cache`
    are taken to be the first of `input_ids`. Raises InputError if `chunk_size` is not positive.
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
