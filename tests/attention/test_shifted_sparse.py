import pytest
import torch
from transformers import LlamaConfig

from lctrain.attention.base import Layout
from lctrain.errors import InputError


def group(position, head, size):
    return position // size if head < 2 else (position + size // 2) // size


DEPENDS_ON_LENGTH = ["s2 ratio"]
CASES = {
    "s2 size": (
        "shifted_sparse",
        {"group_size_ratio": None, "group_size": 8},
        lambda layer, h, q, k, n: k <= q and group(q, h, 8) == group(k, h, 8),
    ),
    "s2 ratio": (
        "shifted_sparse",
        {"group_size_ratio": 0.25},
        lambda layer, h, q, k, n: k <= q and group(q, h, n // 4) == group(k, h, n // 4),
    ),
}
FIELDS = {"group_size_ratio": 0.5, "group_size": (6, {"group_size_ratio": None})}  # another value of each

CONFIG = LlamaConfig(num_attention_heads=8, num_key_value_heads=4)


def grid(method, *, length=16, num_heads=8, num_kv=4, first_head=0, local_heads=None):
    """May attend [H, L, L], causality included."""
    layout = Layout(
        length=length, num_attention_heads=num_heads, num_key_value_heads=num_kv, layer_idx=0, first_head=first_head
    )
    h, i = torch.arange(local_heads or num_heads)[:, None, None], torch.arange(length)
    mask = method.visible(layout)(torch.tensor(0), h, i[:, None], i)
    return (mask & (i <= i[:, None])).expand(len(h), length, length)


def test_equals_the_published_roll_where_that_does_not_wrap(method_of):
    """Roll each row left by half a group, attend inside whole groups, roll back; cut apart what wrapped."""
    length, size = 16, 4
    expected = torch.zeros(8, length, length, dtype=torch.bool)
    for h in range(8):
        shift = size // 2 if h >= 4 else 0
        order = [(i + shift) % length for i in range(length)]
        for group in range(0, length, size):
            members = order[group : group + size]
            expected[h, *torch.cartesian_prod(torch.tensor(members), torch.tensor(members)).T] = True
    expected[4:, :2, -2:] = expected[4:, -2:, :2] = False
    expected &= torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(grid(method_of("shifted_sparse", group_size_ratio=0.25)), expected)
    assert torch.equal(grid(method_of("shifted_sparse", group_size_ratio=None, group_size=4)), expected)


@pytest.mark.parametrize("num_kv", [2, 4, 8])
def test_query_heads_of_one_kv_head_share_its_groups(method_of, num_kv):
    masks = grid(method_of("s2 ratio"), num_kv=num_kv).unflatten(0, (num_kv, -1))
    assert (masks == masks[:, :1]).all()
    assert torch.equal(masks[0], masks[num_kv // 2 - 1])
    assert not torch.equal(masks[0], masks[num_kv // 2])


def test_heads_are_global(method_of):
    method = method_of("s2 ratio")
    whole = grid(method)
    assert torch.equal(grid(method, first_head=2, local_heads=4), whole[2:6])


def test_group_size_means_the_same_at_every_length(method_of):
    method = method_of("shifted_sparse", group_size_ratio=None, group_size=8)
    long = grid(method, length=24)
    for length in (1, 5, 8, 9, 16):
        assert torch.equal(grid(method, length=length), long[:, :length, :length])


@pytest.mark.parametrize("fields", [{"group_size": 8}, {"group_size_ratio": None}])
def test_one_of_ratio_and_size(method_of, fields):
    with pytest.raises(InputError, match=r"give one of attention.group_size_ratio and attention.group_size"):
        method_of("shifted_sparse", **fields)


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5])
def test_ratio_is_a_share(method_of, ratio):
    with pytest.raises(InputError, match="group_size_ratio must be"):
        method_of("shifted_sparse", group_size_ratio=ratio)


@pytest.mark.parametrize("size", [0, -8])
def test_size_is_positive(method_of, size):
    with pytest.raises(InputError, match="group_size must be positive"):
        method_of("shifted_sparse", group_size_ratio=None, group_size=size)


@pytest.mark.parametrize(
    ("fields", "lengths"),
    [
        ({"group_size_ratio": 0.25}, [64, 66]),  # 16.5 tokens
        ({"group_size_ratio": 0.25}, [60]),  # 15 has no half
        ({"group_size_ratio": 0.3}, [100]),  # 30 does not divide 100
        ({"group_size_ratio": None, "group_size": 24}, [24, 64]),
        ({"group_size_ratio": None, "group_size": 128}, [64]),
        ({"group_size_ratio": None, "group_size": 15}, [60]),
    ],
)
def test_lengths_that_groups_do_not_divide_are_refused(method_of, fields, lengths):
    with pytest.raises(InputError, match=f"a sequence of {lengths[-1]} tokens is not divisible into even groups"):
        method_of("shifted_sparse", **fields).check(CONFIG, lengths)


@pytest.mark.parametrize(
    "fields", [{"group_size_ratio": 0.25}, {"group_size_ratio": 1}, {"group_size_ratio": None, "group_size": 16}]
)
def test_lengths_that_groups_divide(method_of, fields):
    method_of("shifted_sparse", **fields).check(CONFIG, [16, 64, 4096])


def test_of_an_odd_number_of_kv_heads_the_middle_one_stays(method_of):
    method, config = method_of("s2 size"), LlamaConfig(hidden_size=72, num_attention_heads=9, num_key_value_heads=3)
    method.check(config, [16])
    layout = Layout(length=16, num_attention_heads=9, num_key_value_heads=3, layer_idx=0)
    assert [method.head_group(layout, head) for head in range(9)] == [False] * 6 + [True] * 3


def test_kernels_run_an_odd_number_of_kv_heads(attending, ids):
    heads = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    fast, slow = (
        attending("s2 size", kernel, **heads)(input_ids=ids(2, 40)).logits for kernel in ("sdpa", "reference")
    )
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


def test_one_kv_head_has_no_half(method_of):
    with pytest.raises(InputError, match="shifts half of the key-value heads, and llama has one"):
        method_of("s2 size").check(LlamaConfig(num_attention_heads=4, num_key_value_heads=1), [16])
