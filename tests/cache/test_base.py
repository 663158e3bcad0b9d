"""Chunked prefill."""

import pytest
import torch

from lctrain.cache.base import prefill
from lctrain.errors import InputError


def last_logits(model, cache, tokens):
    with torch.no_grad():
        return model(tokens[:, -1:], past_key_values=cache).logits


def test_prefill_leaves_the_last_token(serving, ids):
    model, policy = serving("duo")
    tokens, cache = ids(2, 24), policy.new(model)
    prefill(model, tokens, None, cache, 5)
    assert cache.get_seq_length() == 23
    torch.testing.assert_close(
        last_logits(model, cache, tokens), model(tokens, past_key_values=policy.new(model)).logits[:, -1:]
    )


def test_prefill_goes_on_where_the_cache_ends(serving, ids):
    model, policy = serving("duo")
    tokens, caches = ids(1, 24), [policy.new(model) for _ in range(2)]
    prefill(model, tokens[:, :10], None, caches[0], 4)
    for cache in caches:
        prefill(model, tokens, None, cache, 5)
    torch.testing.assert_close(*(last_logits(model, cache, tokens) for cache in caches))


def test_a_prompt_of_one_token_leaves_nothing_to_do(serving, ids):
    model, policy = serving("duo")
    cache = policy.new(model)
    prefill(model, ids(1, 1), None, cache, None)
    assert cache.get_seq_length() == 0


def test_a_chunk_of_nothing_is_refused(serving, ids):
    model, policy = serving("duo")
    with pytest.raises(InputError, match="prefill_chunk_size=0 must be positive"):
        prefill(model, ids(1, 8), None, policy.new(model), 0)
