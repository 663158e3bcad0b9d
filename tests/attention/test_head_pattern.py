from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from lctrain.attention.base import Layout
from lctrain.errors import InputError
from lctrain.heads import HeadPattern

HERE = Path(__file__).parent
RETRIEVES = HeadPattern.read(HERE / "full_attention_heads.tsv").retrieval_heads.tolist()


def retrieves(layer, h):
    return RETRIEVES[layer][h // 2]


CASES = {
    "head_pattern": (
        "head_pattern",
        {"path": str(HERE / "full_attention_heads.tsv"), "num_sink_tokens": 2, "recent_size": 4},
        lambda layer, h, q, k, n: k <= q and (retrieves(layer, h) or k < 2 or q - k < 4),
    )
}
FIELDS = {  # another value of each
    "path": str(HERE / "other_attention_heads.tsv"),
    "threshold": 0.2,
    "streaming_share": 0.75,
    "num_sink_tokens": 4,
    "recent_size": 9,
}


@pytest.mark.parametrize(("share", "name"), [(0.0, "full"), (1.0, "streaming")])
def test_heads_of_one_kind_are_that_attention_to_the_bit(attending, method_of, ids, share, name):
    tokens = ids(2, 40)
    pattern = attending(method_of("head_pattern", streaming_share=share))
    assert torch.equal(pattern(input_ids=tokens).logits, attending(name)(input_ids=tokens).logits)


def test_a_plan_counts_each_head_once(method_of):
    layout = Layout(length=40, num_attention_heads=8, num_key_value_heads=4, layer_idx=1)
    parts = method_of("head_pattern").parts(layout)
    heads = {type(pattern).__name__: num_heads for pattern, num_heads in parts}
    assert heads == {"FullAttention": 4, "StreamingAttention": 4}


def test_ranks_that_share_a_row_split_their_own_heads(method_of):
    """Query heads 4 to 7 of 8, on two key-value heads of four: the first streams in layer 0, the other retrieves."""
    method, q, k = method_of("head_pattern"), torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    layout = Layout(length=5, num_attention_heads=8, num_key_value_heads=4, layer_idx=0, first_head=4)
    ran = {True: torch.zeros(1, 2, 5, 8), False: torch.ones(1, 2, 5, 8)}
    call = SimpleNamespace(layout=layout, run=lambda pattern, *_: ran[pattern == method.streaming])
    out = method.attend(torch.nn.Module(), q, k, k, call)
    assert out[0, :, 0, 0].tolist() == [0, 0, 1, 1]


def test_what_does_not_fit_is_refused(method_of, tmp_path):
    fitting = LlamaConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=8, num_key_value_heads=4)
    method_of("head_pattern").check(fitting, [4, 7])
    with pytest.raises(InputError, match="2 layers of 4 key-value heads, the model 32 of 32"):
        method_of("head_pattern").check(LlamaConfig(), [64])
    with pytest.raises(InputError, match=r"keep 2 \+ 4 tokens, which is all of 6"):
        method_of("head_pattern").check(fitting, [6])
    with pytest.raises(InputError, match="no head pattern"):
        method_of("head_pattern", path=str(tmp_path)).check(fitting, [64])
