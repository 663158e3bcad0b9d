"""What is measured goes through the cache policy, a chunk at a time."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import Cache, DynamicCache, LlamaConfig

from lctrain.cache.base import CachePolicy


@dataclass(frozen=True, kw_only=True)
class Recent(CachePolicy):
    """Keeps as many tokens as a sliding window of transformers does."""

    sliding_window: int

    def new(self, model) -> Cache:
        return DynamicCache(config=LlamaConfig(num_hidden_layers=2, sliding_window=self.sliding_window))


@pytest.fixture
def ids(documents):
    return np.stack([documents[4][i : i + 121] for i in (0, 200)]).astype(np.int64)


@pytest.mark.parametrize("chunk_size", [1, 7, 120, 500])
def test_chunks_change_no_loss(reader, ids, chunk_size):
    torch.testing.assert_close(replace(reader, prefill_chunk_size=chunk_size).losses(ids), reader.losses(ids))


@pytest.mark.parametrize("chunk_size", [1, 50, 500])
def test_chunks_change_no_reply(reader, ids, chunk_size):
    assert replace(reader, prefill_chunk_size=chunk_size).complete(ids, 12) == reader.complete(ids, 12)


def test_losses_and_replies_are_those_of_the_policy(reader, ids):
    short = replace(reader, cache=Recent(sliding_window=9), prefill_chunk_size=1)
    assert short.complete(ids, 12) != reader.complete(ids, 12)
    torch.testing.assert_close(short.losses(ids)[:, :8], reader.losses(ids)[:, :8])
    assert (short.losses(ids)[:, 20:] - reader.losses(ids)[:, 20:]).abs().max() > 0.1
