"""What caches hold: counted in bytes of storage, and as policies foretell it."""

import pytest
import torch

from lctrain.cache.base import prefill
from lctrain.cache.full import MIN_ROOM

EACH_POLICY = pytest.mark.parametrize("policy", ["full", "streaming", "duo"])


def held(cache):
    """Bytes of all storages that the cache's layers refer to."""
    stores = [part.store for layer in cache.layers for part in layer.parts]
    storages = [
        tensor.untyped_storage() for store in stores for tensor in vars(store).values() if torch.is_tensor(tensor)
    ]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    return sum(storage.nbytes() for storage in storages)


@EACH_POLICY
@pytest.mark.parametrize(("rows", "length"), [(1, 40), (2, 70)])
def test_is_what_the_policy_foretells(serving, ids, policy, rows, length):
    model, policy_ = serving(policy)
    cache = policy_.new(model, length)
    prefill(model, ids(rows, length + 1), None, cache, 16)
    assert cache.get_seq_length() == length
    assert held(cache) == policy_.num_bytes(model.config, length, rows, torch.float64)


def test_streaming_heads_hold_the_same_at_any_length(serving, ids):
    model, policy = serving("streaming")
    cache, sizes = policy.new(model), []
    for length in (2, 30, 100, 101):
        prefill(model, ids(1, length), None, cache, 16)
        sizes.append(held(cache))
    assert sizes == [policy.num_bytes(model.config, 1, 1, torch.float64)] * 4


def test_full_heads_grow_in_few_steps_and_little_too_far(serving, ids):
    """Each growth copies all before it."""
    model, policy = serving("full")
    cache, sizes = policy.new(model), []
    for token in ids(1, 800)[0]:
        with torch.no_grad():
            model(token[None, None], past_key_values=cache)
        sizes.append(held(cache))
        needed = policy.num_bytes(model.config, len(sizes), 1, torch.float64)
        assert needed <= sizes[-1] <= max(needed * 5 / 4, needed * (1 + MIN_ROOM / len(sizes)))
    assert len(set(sizes)) < 12


def test_half_of_the_heads_take_half_of_the_memory(serving):
    model, duo = serving("duo")
    _, full = serving("full")
    share = duo.pattern.retrieval_heads.double().mean().item()
    sizes = [policy.num_bytes(model.config, 2**20, 1, torch.bfloat16) for policy in (duo, full)]
    assert sizes[0] / sizes[1] == pytest.approx(share, rel=1e-4)


def test_text_and_cache_positions_hold_the_same(serving, ids):
    sizes = set()
    for positions in ("text", "cache"):
        model, policy = serving("streaming", positions=positions)
        cache = policy.new(model)
        prefill(model, ids(1, 30), None, cache, 7)
        sizes.add(held(cache))
    assert len(sizes) == 1
