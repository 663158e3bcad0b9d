"""What caches hold: counted in bytes of storage, and as policies foretell it."""

import pytest
import torch

from lctrain.cache.base import prefill
from lctrain.cache.full import MIN_ROOM


@pytest.mark.parametrize(("rows", "length"), [(1, 40), (2, 70)])
def test_is_what_the_policy_foretells(serving, ids, held, policy, rows, length):
    model, policy_ = serving(policy)
    cache = policy_.new(model, length)
    prefill(model, ids(rows, length + 1), None, cache, 16)
    assert cache.get_seq_length() == length
    assert held(cache) == policy_.num_bytes(model.config, length, rows, torch.float64)


def test_full_heads_grow_in_few_steps_and_little_too_far(serving, ids, held):
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
