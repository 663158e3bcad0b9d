"""The interface of a cache policy, and how a long prompt is read in chunks.

Shape legend: B batch, S tokens of the row.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from lctrain.errors import InputError


class CachePolicy(ABC):
    """What is kept of the keys and values before, and what of it is attended: makes caches for `generate`."""

    @abstractmethod
    def new(self, model: PreTrainedModel) -> Cache:
        """An empty cache: `model.generate(…, past_key_values=policy.new(model))`. InputError if it can't serve it."""

    def check(self, config: PreTrainedConfig, length: int) -> None:  # noqa: B027 - most fit always
        """Raise InputError if the policy does not fit the model, or rows of this length."""


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
