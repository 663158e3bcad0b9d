"""transformers' generate through every policy, against generation by its reference without a cache."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch

from lctrain.cache.base import prefill
from lctrain.errors import InputError

LENGTH, NEW = 23, 8
HOW = {
    "greedy": ([LENGTH], {}),
    "chunks": ([4, 4, 4, 4, 4, 3], {"prefill_chunk_size": 4}),
    "sampling": ([LENGTH], {"do_sample": True, "temperature": 0.8, "num_return_sequences": 2}),
    "beams": ([LENGTH], {"num_beams": 3, "num_return_sequences": 2}),
}  # name: (how many tokens the first forwards read, what generate is told)


def generate(model, tokens, mask, **how):
    torch.manual_seed(0)
    # The padding token embeds as zero: its query weighs all keys alike, and a score made of its weights is a draw.
    how = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 2, "suppress_tokens": [2]} | how
    return model.generate(tokens, attention_mask=mask, eos_token_id=None, **how)


def padded(tokens):
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    return mask


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mask_of", [torch.ones_like, padded])
def test_generates_as_without_a_cache(serving, naive, ids, policy, how, mask_of):
    tokens, (sizes, told) = ids(2, LENGTH), HOW[how]
    model, policy_ = serving(policy)
    found = generate(model, tokens, mask_of(tokens), past_key_values=policy_.new(model), **told)
    without = {name: value for name, value in told.items() if name != "prefill_chunk_size"}
    expected = generate(naive(policy, sizes), tokens, mask_of(tokens), use_cache=False, **without)
    assert torch.equal(found, expected)


def test_several_continuations_of_one_prefill(serving, naive, ids, policy):
    tokens = ids(2, LENGTH)
    model, policy_ = serving(policy)
    cache = policy_.new(model)
    with torch.no_grad():
        model(tokens[:, :-1], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    found = generate(model, tokens, torch.ones_like(tokens), past_key_values=cache, num_beams=3)
    expected = generate(naive(policy, [LENGTH - 1]), tokens, torch.ones_like(tokens), use_cache=False, num_beams=3)
    assert torch.equal(found, expected)


def test_rows_can_be_dropped(serving, naive, ids, policy):
    tokens = ids(3, LENGTH)
    model, policy_ = serving(policy)
    cache = policy_.new(model)
    with torch.no_grad():
        model(tokens[:, :-1], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([2]))
    found = generate(model, tokens[2:], None, past_key_values=cache)
    assert torch.equal(found, generate(naive(policy, [LENGTH - 1]), tokens[2:], None, use_cache=False))


def test_a_cache_that_was_reset_is_new(serving, ids, policy):
    model, policy_ = serving(policy)
    cache = policy_.new(model)
    first, second = (
        generate(model, ids(2, LENGTH, seed), None, past_key_values=cache) for seed in (1, 2) if not cache.reset()
    )
    assert torch.equal(second, generate(model, ids(2, LENGTH, 2), None, past_key_values=policy_.new(model)))
    assert not torch.equal(first[:, LENGTH:], second[:, LENGTH:])


def test_another_number_of_rows_is_refused(serving, ids, policy):
    model, policy_ = serving(policy)
    cache = policy_.new(model)
    model(ids(2, 5), past_key_values=cache)
    with pytest.raises(InputError, match="the cache holds 2 rows, not 3; for several continuations of each, call"):
        model(ids(3, 1), past_key_values=cache)


def test_assisted_generation_needs_a_cache_that_forgets_nothing(serving, ids, policy):
    model, policy_ = serving(policy)
    tokens, cache = ids(1, 6).repeat(1, 4), policy_.new(model)
    plain = generate(model, tokens, None, past_key_values=policy_.new(model))
    forgets = any(part.store.forgets for layer in cache.layers for part in layer.parts)
    refusal = pytest.raises(InputError, match="can't be brought back: assisted generation needs cache=full")
    with refusal if forgets else nullcontext():
        assisted = generate(model, tokens, None, past_key_values=cache, prompt_lookup_num_tokens=3)
        assert torch.equal(assisted, plain)
    assert forgets == policy_.decides


def test_a_prefix_that_was_read_once_serves_many(serving, ids, policy):
    """As transformers shows it: what goes on from a copy leaves the original as it is."""
    model, policy_ = serving(policy)
    prefix, endings = ids(1, LENGTH), [ids(1, 5, seed) for seed in (1, 2)]

    def read():
        cache = policy_.new(model)
        prefill(model, torch.cat((prefix, endings[0][:, :1]), dim=1), None, cache, 7)
        return cache

    shared = read()
    for ending in endings:
        tokens = torch.cat((prefix, ending), dim=1)
        found = generate(model, tokens, None, past_key_values=deepcopy(shared))
        assert torch.equal(found, generate(model, tokens, None, past_key_values=read()))
