import pytest
from transformers import LlamaConfig

from lctrain.errors import InputError

CASES = {
    "streaming": (
        "streaming",
        {"num_sink_tokens": 2, "recent_size": 4},
        lambda layer, h, q, k, n: k <= q and (k < 2 or q - k < 4),
    )
}
FIELDS = {"num_sink_tokens": 4, "recent_size": 9}  # another value of each


@pytest.mark.parametrize("fields", [{"recent_size": 0}, {"recent_size": -1}, {"num_sink_tokens": -1}])
def test_sizes_must_be_positive(method_of, fields):
    with pytest.raises(InputError, match=f"{next(iter(fields))} must"):
        method_of("streaming", **fields)


def test_longer_than_the_longest_row_is_refused(method_of):
    method = method_of("streaming", num_sink_tokens=4, recent_size=13)
    method.check(LlamaConfig(), [8, 17])
    with pytest.raises(InputError, match=r"= 17 is longer than the longest sequence \(16\)"):
        method.check(LlamaConfig(), [8, 16])
