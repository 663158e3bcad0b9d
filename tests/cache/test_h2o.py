from collections import defaultdict

import pytest
import torch

from lctrain.cache.h2o import H2OCache
from lctrain.errors import InputError

SIZES = {"budget": 8, "recent_size": 3}


def head(q, k, v, scaling, forwards, num_heavy):
    """The paper's algorithm for one key-value head, a forward at a time: tokens, and the attention each received."""
    kept, received, out = [], defaultdict(float), torch.empty_like(q)
    for forward in forwards:
        for i in forward:
            seen = kept + [j for j in forward if j <= i]
            weights = (q[:, i] @ k[seen].T * scaling).softmax(-1)
            out[:, i] = weights @ v[seen]
            for j, weight in zip(seen, weights.sum(0).tolist(), strict=True):
                received[j] += weight
        earlier, recent = (kept + forward)[:-3], (kept + forward)[-3:]
        kept = sorted(sorted(earlier, key=received.__getitem__)[-num_heavy:]) + recent
    return out


def heavy_hitters(*num_heavy):
    """The output of each head where its layer keeps so many heavy hitters beside 3 recent tokens."""
    return lambda row: torch.stack(
        [head(*qkv, row.scaling, row.forwards, num_heavy[row.layer]) for qkv in zip(row.q, row.k, row.v, strict=True)]
    )


CASES = {
    "h2o": ("h2o", SIZES, heavy_hitters(5, 5, 5, 5)),
    # 4 · 5 heavy hitters as 8⅓, 6⅑, 3⁸⁄₉ and 1⅔, rounded
    "h2o in a pyramid": ("h2o", SIZES | {"pyramid_beta": 3}, heavy_hitters(8, 6, 4, 2)),
}
FIELDS = {"budget": 10, "recent_size": 2, "pyramid_beta": 4}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"recent_size": 8}, "recent_size=8 must be at least 0 and less than cache.budget=8"),
        ({"recent_size": -1}, "recent_size=-1 must be at least 0"),
        ({"pyramid_beta": 0.5}, "pyramid_beta=0.5 must be at least 1"),
    ],
)
def test_fields(fields, reason):
    with pytest.raises(InputError, match=reason):
        H2OCache(**SIZES | {"pyramid_beta": 1} | fields)
