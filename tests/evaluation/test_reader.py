"""What is measured goes through the cache policy, a chunk at a time."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from lctrain.cache.full import FullCache
from lctrain.cache.streaming import StreamingCache


@pytest.fixture
def ids(documents):
    return np.stack([documents[4][i : i + 121] for i in (0, 200)]).astype(np.int64)


REPLY = [12, 12]  # tokens


@pytest.mark.parametrize("chunk_size", [1, 7, 120, 500])
def test_chunks_change_no_loss(reader, ids, chunk_size):
    torch.testing.assert_close(replace(reader, prefill_chunk_size=chunk_size).losses(ids), reader.losses(ids))


@pytest.mark.parametrize("chunk_size", [1, 50, 500])
def test_chunks_change_no_reply(reader, ids, chunk_size):
    assert replace(reader, prefill_chunk_size=chunk_size).complete(ids, REPLY) == reader.complete(ids, REPLY)


def test_a_folders_settings_of_generation_change_no_reply(reader, ids):
    """Chat models bring penalties and minimum lengths, which are no part of the model that is measured."""
    replies, config = reader.complete(ids, REPLY), reader.model.generation_config
    before = copy.deepcopy(config)
    config.repetition_penalty, config.no_repeat_ngram_size, config.do_sample, config.temperature = 5.0, 1, True, 3.0
    try:
        assert reader.complete(ids, REPLY) == replies
    finally:
        reader.model.generation_config = before


@pytest.mark.parametrize("chunk_size", [1, 50, None])
def test_losses_and_replies_are_those_of_the_policy(reader, ids, chunk_size):
    streaming = StreamingCache(num_sink_tokens=1, recent_size=8, positions="text")
    short = replace(reader, cache=streaming, prefill_chunk_size=chunk_size)
    assert short.complete(ids, REPLY) != reader.complete(ids, REPLY)
    torch.testing.assert_close(short.losses(ids)[:, :8], reader.losses(ids)[:, :8])
    assert (short.losses(ids)[:, 20:] - reader.losses(ids)[:, 20:]).abs().max() > 0.1


@pytest.fixture
def prompts(documents):
    """Of 1, 90, 7 and 61 tokens."""
    return [documents[4][start : start + n].astype(np.int64) for start, n in ((0, 1), (40, 90), (200, 7), (300, 61))]


STREAMING = StreamingCache(num_sink_tokens=2, recent_size=16, positions="text")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_size", [None, 1, 16])
@pytest.mark.parametrize("cache", [FullCache(), STREAMING])
def test_rows_of_different_lengths_are_read_as_if_alone(reader, prompts, cache, chunk_size, dtype):
    model = copy.deepcopy(reader.model).to(dtype)
    by = replace(reader, model=model, cache=cache, prefill_chunk_size=chunk_size)
    num_tokens = [20, 5, 12, 20]
    alone = [by.complete([prompt], [n])[0] for prompt, n in zip(prompts, num_tokens, strict=True)]
    assert by.complete(prompts, num_tokens) == alone
    assert len(set(alone)) == 4
    assert by.complete(prompts[::-1], num_tokens[::-1]) == alone[::-1]


def test_a_reply_that_ends_early_is_followed_by_nothing(reader, prompts, make_tokenizer):
    reader = replace(reader, model=copy.deepcopy(reader.model), tokenizer=make_tokenizer())  # token 0 is text
    whole = reader.complete(prompts, [20] * 4)
    assert "<" in whole[1]
    assert "<" not in whole[3]
    reader.model.generation_config.eos_token_id = reader.tokenizer.convert_tokens_to_ids("<")
    short = reader.complete(prompts, [20] * 4)
    assert short[1] == whole[1].partition("<")[0] + "<"
    assert short[3] == whole[3]
