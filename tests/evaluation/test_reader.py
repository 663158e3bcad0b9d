"""What is measured goes through the cache policy, a chunk at a time."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from lctrain.attention.full import FullAttention
from lctrain.cache.streaming import StreamingCache
from lctrain.model.install import install


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
    model = deepcopy(reader.model)
    install(model, FullAttention())
    recent = StreamingCache(num_sink_tokens=0, recent_size=9, positions="text")
    short = replace(reader, model=model, cache=recent, prefill_chunk_size=50)
    assert short.complete(ids, 12) != reader.complete(ids, 12)
    torch.testing.assert_close(short.losses(ids)[:, :8], reader.losses(ids)[:, :8])
    assert (short.losses(ids)[:, 20:] - reader.losses(ids)[:, 20:]).abs().max() > 0.1
