import pytest
from transformers import LlamaConfig, MistralConfig

from lctrain.errors import InputError

CASES = {
    "window": ("sliding_window", {"sliding_window": 5}, lambda layer, h, q, k, n: q - 5 < k <= q),
    "window per layer": (
        "sliding_window",
        {"sliding_window": [3, 7]},
        lambda layer, h, q, k, n: q - [3, 7][layer] < k <= q,
    ),
}
FIELDS = {"sliding_window": [9, 9]}  # another value of each

LLAMA = LlamaConfig(num_hidden_layers=2)


@pytest.mark.parametrize("width", [0, -3, [4, 0]])
def test_width_must_be_positive(method_of, width):
    with pytest.raises(InputError, match="sliding_window must be positive"):
        method_of("sliding_window", sliding_window=width)


def test_a_list_has_one_width_per_layer(method_of):
    method_of("sliding_window", sliding_window=[4, 8]).check(LLAMA, [16])
    with pytest.raises(InputError, match="lists 3 widths, but the model has 2 layers"):
        method_of("sliding_window", sliding_window=[4, 8, 8]).check(LLAMA, [16])


@pytest.mark.parametrize("width", [17, [4, 17]])
def test_wider_than_the_longest_row_is_refused(method_of, width):
    method = method_of("sliding_window", sliding_window=width)
    method.check(LLAMA, [8, 17])
    with pytest.raises(InputError, match=r"sliding_window=17 is wider than the longest sequence \(16\)"):
        method.check(LLAMA, [8, 16])


def test_replaces_the_models_own_window_and_says_so(method_of):
    config = MistralConfig(sliding_window=6)
    assert "own window of 6 tokens is replaced by 9" in method_of("sliding_window", sliding_window=9).adapt_config(
        config
    )
    assert config.sliding_window == 9
    assert method_of("sliding_window", sliding_window=9).adapt_config(LLAMA) is None


def test_layers_of_one_width_share_a_mask(method_of):
    method = method_of("sliding_window", sliding_window=[4, 8, 4])
    assert method.layer_group(0) == method.layer_group(2) != method.layer_group(1)
