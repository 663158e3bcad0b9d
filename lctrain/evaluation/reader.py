"""The model under evaluation and the cache through which it reads. Shapes: B rows, L tokens, D hidden."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lctrain.cache.base import CachePolicy, prefill
from lctrain.cache.full import FullCache
from lctrain.model.head import hidden_states, token_losses

# generate takes whatever is not given from the model's folder, where chat models have penalties and minimum lengths.
GREEDY = {
    "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A model with its tokenizer, its cache policy, and how many tokens it reads at once (None: all).

    Every measurement goes through the cache that generation uses, so that the same pattern is measured and served.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    cache: CachePolicy = field(default_factory=FullCache)
    prefill_chunk_size: int | None = None

    def complete(self, prompts: Sequence[NDArray[np.integer[Any]]], num_tokens: Sequence[int]) -> list[str]:
        """Return the text that greedy decoding writes after each prompt, at most `num_tokens` tokens of its own.

        Prompts of different lengths are padded on the left; each reply is the one that its prompt alone would get.
        """
        input_ids, mask = self._padded(prompts)
        cache = self.cache.new(self.model)
        prefill(self.model, input_ids, mask, cache, self.prefill_chunk_size)
        config = GenerationConfig(**GREEDY, max_new_tokens=max(num_tokens), pad_token_id=self._pad_token_id)
        output = cast(Any, self.model).generate(
            input_ids=input_ids, attention_mask=mask, past_key_values=cache, generation_config=config
        )
        written = output[:, input_ids.shape[1] :].tolist()
        replies = [row[:limit] for row, limit in zip(written, num_tokens, strict=True)]
        return self.tokenizer.batch_decode(replies, skip_special_tokens=True)

    @property
    def _pad_token_id(self) -> int:
        """Return a special token if there is one: it also follows a reply that ends early, and is not decoded."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return (eos or 0) if pad is None else pad

    def _padded(self, prompts: Sequence[NDArray[np.integer[Any]]]) -> tuple[Tensor, Tensor]:
        """Return ids and mask [B, L], where L is the longest prompt's length and the mask is 0 at padding."""
        shape = len(prompts), max(map(len, prompts))
        input_ids, mask = np.full(shape, self._pad_token_id, np.int64), np.zeros(shape, np.int64)
        for row, prompt in enumerate(prompts):
            input_ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
        return torch.from_numpy(input_ids).to(self.model.device), torch.from_numpy(mask).to(self.model.device)

    def losses(self, ids: NDArray[np.int64]) -> Tensor:
        """Return the negative log-likelihood in fp32 [B, L] of each token of `ids` [B, L + 1] but the first."""
        rows = torch.from_numpy(ids).to(self.model.device)
        inputs_BL, labels_BL = rows[:, :-1], rows[:, 1:]
        # Full attention over the whole row needs no cache; a cache would double the row's memory.
        plain = self.prefill_chunk_size is None and isinstance(self.cache, FullCache)
        cache = None if plain else self.cache.new(self.model)
        losses = []
        for chunk in torch.arange(inputs_BL.shape[1], device=rows.device).split(self.prefill_chunk_size or len(ids[0])):
            hidden_BLD = hidden_states(self.model, inputs_BL[:, chunk], chunk.expand(len(rows), -1), cache)
            losses.append(token_losses(self.model, hidden_BLD, labels_BL[:, chunk])[1].view(len(rows), -1))
        return torch.cat(losses, dim=1)
