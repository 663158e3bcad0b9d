import itertools

import pytest
import torch
from transformers import LlamaConfig

from lctrain.attention.base import Layout
from lctrain.errors import InputError
from lctrain.kernels.columns import MAX_ROWS, Columns
from lctrain.kernels.interval import Interval

SMALL = {"block_size": 2, "num_global_blocks": 1, "num_window_blocks": 2, "num_random_blocks": 2, "seed": 3}
FIELDS = {"block_size": 3, "num_global_blocks": 2, "num_window_blocks": 3, "num_random_blocks": 1, "seed": 4}
MASK_64 = 2**64 - 1


def mix(*numbers):
    """SplitMix64's steps on signed 64-bit integers, in Python's own."""
    mixed = 0
    for number in numbers:
        mixed = (mixed + number + 0x1E3779B97F4A7C15) * 0x3F58476D1CE4E5B9 & MASK_64
        mixed = (mixed ^ (signed(mixed) >> 30)) * 0x14D049BB133111EB & MASK_64
        mixed = (mixed ^ (signed(mixed) >> 27)) & MASK_64
    return mixed & (2**62 - 1)


def signed(number):
    return number - 2**64 if number >= 2**63 else number


def drawn(layer, head, block):
    """Floyd's algorithm, as it is written down for sets."""
    num_between, chosen = block - 2, set()
    if num_between <= 2:
        return {1 + i for i in range(max(0, num_between))}
    for entry in range(2):
        last = num_between - 2 + entry
        number = mix(3, layer, head, block, entry) % (last + 1)
        chosen.add(last if number in chosen else number)
    return {1 + number for number in chosen}


def pattern(layer, h, q, k, n):
    row, column = q // 2, k // 2
    return k <= q and (column < 1 or row - column < 2 or column in drawn(layer, h, row))


CASES = {"bigbird": ("bigbird", SMALL, pattern)}


def table(method, length, layer=0):
    layout = Layout(length=length, num_attention_heads=4, num_key_value_heads=2, layer_idx=layer)
    return method._draw(layout)


def test_a_row_draws_the_same_whatever_comes_after_it(method_of):
    method = method_of("bigbird")
    assert torch.equal(table(method, 40), table(method, 400)[:, :20])


def test_draws_differ_between_layers_and_heads_and_meet_every_block_alike(method_of):
    method = method_of("bigbird", num_random_blocks=3)
    drawn_HMR = table(method, 4000)
    assert len(drawn_HMR[:, -1].sort(-1).values.unique(dim=0)) == 4
    assert not torch.equal(drawn_HMR, table(method, 4000, layer=1))
    assert all(len(set(row)) == 3 for row in drawn_HMR[0, 10:].tolist())
    blocks = (drawn_HMR[:, 1000:] - 1).flatten() / torch.arange(1000, 2000).repeat_interleave(3).repeat(4)
    counts = torch.histc(blocks, 10, 0, 1) / blocks.numel()
    assert ((counts - 0.1).abs() < 0.02).all()  # five standard deviations of 12,000 draws are 0.014


def test_bounds_of_columns_hold_for_every_entry():
    columns = Columns(torch.randint(-1, 12, (2, 12, 3), generator=torch.Generator().manual_seed(0)))
    heads, numbers = torch.arange(2)[:, None, None], torch.arange(12)
    entries = columns.hold(heads, numbers[:, None], numbers)
    known = 0
    for first, last in itertools.combinations_with_replacement(range(12), 2):
        for low, high in itertools.combinations_with_replacement(range(12), 2):
            row, column = Interval(torch.tensor([[first]]), torch.tensor([[last]])), Interval(low, high)
            bounds = columns.hold(heads, row, column)
            inside = entries[:, first : last + 1, low : high + 1].flatten(1)
            assert not (bounds.lo.flatten() & ~inside.all(1)).any()
            assert not (inside.any(1) & ~bounds.hi.flatten()).any()
            if last - first < MAX_ROWS:
                assert torch.equal(inside.any(1), bounds.hi.flatten())
                known += 1
    assert known > 1000


@pytest.mark.parametrize(
    "fields", [{"block_size": 0}, {"num_window_blocks": 0}, {"num_global_blocks": -1}, {"num_random_blocks": -1}]
)
def test_numbers_that_mean_nothing_are_refused(method_of, fields):
    with pytest.raises(InputError, match=f"{next(iter(fields))} must"):
        method_of("bigbird", **fields)


def test_more_blocks_than_the_longest_row_has_are_refused(method_of):
    method_of("bigbird").check(LlamaConfig(), [10])
    with pytest.raises(InputError, match=r"= 10 is longer than the longest sequence \(9\)"):
        method_of("bigbird").check(LlamaConfig(), [9])
