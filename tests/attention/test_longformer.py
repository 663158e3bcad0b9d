import pytest
from transformers import LlamaConfig

from lctrain.errors import InputError

CASES = {
    "longformer": (
        "longformer",
        {"sliding_window": 3, "num_global_tokens": 2, "dilation": 2},
        lambda layer, h, q, k, n: k <= q and (k in (q, q - 2, q - 4) or k < 2),
    )
}
FIELDS = {"sliding_window": 9, "num_global_tokens": 4, "dilation": 3}  # another value of each


@pytest.mark.parametrize("fields", [{"sliding_window": 0}, {"dilation": 0}, {"num_global_tokens": -1}])
def test_sizes_must_be_positive(method_of, fields):
    with pytest.raises(InputError, match=f"{next(iter(fields))} must"):
        method_of("longformer", **fields)


def test_longer_than_the_longest_row_is_refused(method_of):
    method = method_of("longformer", sliding_window=4, dilation=3, num_global_tokens=5)
    method.check(LlamaConfig(), [17])
    with pytest.raises(InputError, match=r"= 17 is longer than the longest sequence \(16\)"):
        method.check(LlamaConfig(), [8, 16])
