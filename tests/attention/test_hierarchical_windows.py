import pytest
import torch
from transformers import LlamaConfig

from lctrain.errors import InputError
from lctrain.model.install import attention_modules

WIDTHS = [3, 9]


def windows_combined(module, q, k, v, scaling):
    """Every head attends with each width; P maps the concatenated outputs to the head's."""
    out = torch.zeros_like(q)
    for h in range(q.shape[1]):
        kv_head = h // (q.shape[1] // k.shape[1])
        for i in range(q.shape[2]):
            outs = []
            for width in WIDTHS:
                seen = [j for j in range(i + 1) if i - j < width]
                scores = torch.einsum("bd,bsd->bs", q[:, h, i], k[:, kv_head, seen]) * scaling
                outs.append(torch.einsum("bs,bsd->bd", scores.softmax(-1), v[:, kv_head, seen]))
            weight = module.hierarchical_windows.weight[h]
            out[:, h, i] = sum(o @ weight[w] for w, o in enumerate(outs))
    return out


CASES = {
    "windows by heads": (
        "hierarchical_windows",
        {"sliding_windows": WIDTHS, "combine": "heads"},
        lambda layer, h, q, k, n: q - WIDTHS[h // 2] < k <= q,  # four query heads on two key-value heads
    ),
    "windows combined": (
        "hierarchical_windows",
        {"sliding_windows": WIDTHS, "combine": "projection"},
        {"attend": windows_combined},
    ),
}
FIELDS = {"sliding_windows": [2, 30], "combine": "heads"}


def test_the_projection_begins_as_the_widest_window(attending, method_of, ids):
    tokens = ids(2, 40)
    model, widest = attending("windows combined"), attending(method_of("window", sliding_window=WIDTHS[-1]))
    for module in attention_modules(model):
        weight = module.hierarchical_windows.weight
        fresh = method_of("windows combined").child(model.config, None).weight
        weight.data.copy_(fresh)
    torch.testing.assert_close(model(input_ids=tokens).logits, widest(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sliding_windows": [8]}, "must be two or more, ascending"),
        ({"sliding_windows": [8, 4]}, "must be two or more, ascending"),
        ({"sliding_windows": [0, 4]}, "must be positive"),
        ({"combine": "sum"}, "combine=sum is neither heads nor projection"),
    ],
)
def test_widths_ascend_and_are_combined_somehow(method_of, fields, reason):
    with pytest.raises(InputError, match=reason):
        method_of("hierarchical_windows", **fields)


def test_what_does_not_fit_the_model_or_its_rows_is_refused(method_of):
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2)
    fitting = method_of("hierarchical_windows", sliding_windows=[2, 4, 8])
    fitting.check(config, [8])
    with pytest.raises(InputError, match=r"the widest is wider than the longest sequence \(7\)"):
        fitting.check(config, [7])
    with pytest.raises(InputError, match="among 3 widths, and the model has 2; give fewer"):
        method_of("hierarchical_windows", sliding_windows=[2, 4, 8], combine="heads").check(config, [8])
