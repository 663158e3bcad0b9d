import pytest

from lctrain.cache.base import prefill
from lctrain.cache.streaming import StreamingCache
from lctrain.errors import InputError

SIZES = {"num_sink_tokens": 3, "recent_size": 5}


def sees(i, j):
    return (j < 3) | (i - j < 5)


CASES = {
    "streaming": ("streaming", SIZES | {"positions": "text"}, lambda row: row.attend(sees)),
    "streaming in the cache": (
        "streaming",
        SIZES | {"positions": "cache"},
        lambda row: row.attend_in_the_cache(sees),
    ),
}
FIELDS = {"num_sink_tokens": 1, "recent_size": 9, "positions": "cache"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"recent_size": 0}, "recent_size of at least 1, not 3 and 0"),
        ({"num_sink_tokens": -1}, "not -1 and 5"),
        ({"positions": "ring"}, "positions=ring is neither text nor cache"),
    ],
)
def test_fields(fields, reason):
    with pytest.raises(InputError, match=reason):
        StreamingCache(**{"num_sink_tokens": 3, "recent_size": 5, "positions": "text"} | fields)


def test_takes_the_same_at_any_length_and_positions(serving, ids, held):
    sizes = set()
    for name in CASES:
        model, policy = serving(name)
        cache = policy.new(model)
        for length in (2, 30, 100, 101):
            prefill(model, ids(1, length), None, cache, 16)
            sizes.add(held(cache))
        sizes.add(policy.num_bytes(model.config, 1, 1, model.dtype))
    assert len(sizes) == 1
