"""Chunked prefill, for every policy."""

import pytest
import torch

from lctrain.attention.full import FullAttention
from lctrain.cache.base import prefill
from lctrain.cache.full import FullCache
from lctrain.errors import InputError
from lctrain.model.install import install

GREEDY = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("chunk_size", [None, 1, 7, 64])
def test_generation_goes_on_behind_a_chunked_prefill(tiny, ids, chunk_size, padding):
    model = tiny("llama")
    install(model, FullAttention())
    tokens = ids(2, 24)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    cache = FullCache().new(model)
    prefill(model, tokens, mask, cache, chunk_size)
    assert cache.get_seq_length() == 23
    expected = model.generate(tokens, attention_mask=mask, **GREEDY)
    found = model.generate(tokens, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


def test_prefill_goes_on_where_the_cache_ends(tiny, ids):
    model, tokens = tiny("llama"), ids(1, 24)
    caches = [FullCache().new(model) for _ in range(2)]
    prefill(model, tokens[:, :10], None, caches[0], 4)
    for cache in caches:
        prefill(model, tokens, None, cache, 5)
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(layers[0].keys, layers[1].keys)


def test_a_chunk_of_nothing_is_refused(tiny, ids):
    model = tiny("llama")
    with pytest.raises(InputError, match="prefill_chunk_size=0 must be positive"):
        prefill(model, ids(1, 8), None, FullCache().new(model), 0)
