"""What is measured goes through the cache policy, a chunk at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lctrain.cache.streaming import StreamingCache


@pytest.fixture
def ids(documents):
    return np.stack([documents[4][i : i + 121] for i in (0, 200)]).astype(np.int64)


@pytest.mark.parametrize("chunk_size", [1, 7, 120, 500])
def test_chunks_change_no_loss(reader, ids, chunk_size):
    torch.testing.assert_close(replace(reader, prefill_chunk_size=chunk_size).losses(ids), reader.losses(ids))


@pytest.mark.parametrize("chunk_size", [1, 50, 500])
def test_chunks_change_no_reply(reader, ids, chunk_size):
    assert replace(reader, prefill_chunk_size=chunk_size).complete(ids, 12) == reader.complete(ids, 12)


@pytest.mark.parametrize("chunk_size", [1, 50, None])
def test_losses_and_replies_are_those_of_the_policy(reader, ids, chunk_size):
    streaming = StreamingCache(num_sink_tokens=1, recent_size=8, positions="text")
    short = replace(reader, cache=streaming, prefill_chunk_size=chunk_size)
    assert short.complete(ids, 12) != reader.complete(ids, 12)
    torch.testing.assert_close(short.losses(ids)[:, :8], reader.losses(ids)[:, :8])
    assert (short.losses(ids)[:, 20:] - reader.losses(ids)[:, 20:]).abs().max() > 0.1
