import pytest
import torch

from lctrain.cache.duo import DuoCache
from lctrain.cache.full import FullCache
from lctrain.errors import InputError
from lctrain.heads import HeadPattern

# Layers of both kinds of heads, of retrieval heads alone and of streaming heads alone; as many heads as are needed.
RETRIEVES = [[True, False, False, True], [True] * 4, [False] * 4, [False, True, True, True]]


def pattern(num_kv_heads, recent_size=5):
    gates = torch.tensor(RETRIEVES)[:, :num_kv_heads].double()
    return HeadPattern.from_gates(gates, threshold=0.5, num_sink_tokens=3, recent_size=recent_size)


def sees(i, j):
    return (j < 3) | (i - j < 5)


def heads(row, streaming):
    """The retrieval heads of full attention, the others of `streaming`."""
    retrieves = torch.tensor(RETRIEVES[row.layer][: len(row.k)])[:, None, None, None]
    return torch.where(retrieves, row.attend(lambda i, j: j <= i), streaming)


CASES = {
    "duo": ("duo", lambda kv: {"pattern": pattern(kv), "positions": "text"}, lambda row: heads(row, row.attend(sees))),
    "duo in the cache": (
        "duo",
        lambda kv: {"pattern": pattern(kv), "positions": "cache"},
        lambda row: heads(row, row.attend_in_the_cache(sees)),
    ),
}
FIELDS = {"pattern": pattern(2, recent_size=9), "positions": "cache"}


def test_positions():
    with pytest.raises(InputError, match="positions=ring is neither text nor cache"):
        DuoCache(pattern=pattern(2), positions="ring")


def test_half_of_the_heads_take_half_of_the_memory(serving):
    model, duo = serving("duo")
    share = duo.pattern.retrieval_heads.double().mean().item()
    sizes = [policy.num_bytes(model.config, 2**20, 1, torch.bfloat16) for policy in (duo, FullCache())]
    assert sizes[0] / sizes[1] == pytest.approx(share, rel=1e-4)
