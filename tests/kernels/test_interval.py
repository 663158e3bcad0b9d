"""Every operator against all values that its operands may have."""

import itertools

import pytest
import torch

from lctrain.kernels.interval import Blocks, Interval

RANGES = [(0, 0), (3, 3), (0, 4), (2, 7), (-5, -2), (-3, 2), (5, 5)]
BINARY = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "<": lambda x, y: x < y,
    "<=": lambda x, y: x <= y,
    ">": lambda x, y: x > y,
    ">=": lambda x, y: x >= y,
    "==": lambda x, y: x == y,
    "!=": lambda x, y: x != y,
}
UNARY = {
    "-x": lambda x: -x,
    "3 - x": lambda x: 3 - x,
    "x // 3": lambda x: x // 3,
    "x % 3": lambda x: x % 3,
    "~(x > 1)": lambda x: ~(x > 1),
    "(x < 3) & (x > 0)": lambda x: (x < 3) & (x > 0),
    "(x < 0) | (x > 2)": lambda x: (x < 0) | (x > 2),
}
NOT_BEST = {"(x < 3) & (x > 0)", "(x < 0) | (x > 2)", "x % 3"}  # x occurs twice, or wraps: wider, never wrong


def values(bounds):
    return torch.arange(bounds[0], bounds[1] + 1)


def check(result, exact, best=True):
    low, high = exact.min(), exact.max()
    assert torch.as_tensor(result.lo) <= low
    assert torch.as_tensor(result.hi) >= high
    if best:
        assert (int(result.lo), int(result.hi)) == (int(low), int(high))


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize(("x", "y"), [*itertools.product(RANGES, RANGES)])
def test_two_operands(name, x, y):
    exact = BINARY[name](values(x)[:, None], values(y))
    check(BINARY[name](Interval(*map(torch.tensor, x)), Interval(*map(torch.tensor, y))), exact)
    if y[0] == y[1]:  # a number, and a tensor on either side
        check(BINARY[name](Interval(*x), y[0]), exact)
        check(BINARY[name](Interval(*map(torch.tensor, x)), torch.tensor(y[0])), exact)
        swapped = BINARY[name](values(y)[:, None], values(x))
        check(BINARY[name](torch.tensor(y[0]), Interval(*map(torch.tensor, x))), swapped)


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("x", RANGES)
def test_one_operand(name, x):
    check(UNARY[name](Interval(*map(torch.tensor, x))), UNARY[name](values(x)), best=name not in NOT_BEST)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: bool(x > 1),
        lambda x: 1 if x > 1 else 0,
        lambda x: x // -2,
        lambda x: x % torch.tensor(3),
        lambda x: x & 1,
        lambda x: ~x,
        lambda x: torch.arange(9)[x],
        torch.sqrt,
        lambda x: torch.where(x > 1, 1, 2),
        lambda x: x.abs(),
        abs,
    ],
)
def test_what_has_no_bounds_raises(function):
    with pytest.raises((TypeError, AttributeError, IndexError)):
        function(Interval(torch.tensor(0), torch.tensor(4)))


@pytest.mark.parametrize("numbers", [[0, 1, 2], [1], [2, 0]])
@pytest.mark.parametrize("length", [12, 11, 9])
def test_blocks_of_a_table(length, numbers):
    table = torch.randint(0, 9, (2, length), generator=torch.Generator().manual_seed(0))
    blocks = Blocks(torch.tensor(numbers), size=4, length=length, axis=-1)
    found = blocks.look_up(torch.nn.functional.pad(table, (0, 5), value=99))  # what lies behind is not looked at
    for i, block in enumerate(numbers):
        part = table[:, block * 4 : (block + 1) * 4]
        assert torch.equal(found.lo[:, 0, 0, i], part.amin(1))
        assert torch.equal(found.hi[:, 0, 0, i], part.amax(1))
        assert (int(blocks.lo[..., i]), int(blocks.hi[..., i])) == (block * 4, min((block + 1) * 4, length) - 1)
        assert bool(blocks.whole()[..., i]) == (part.shape[1] == 4)


def test_parts_of_blocks_where_documents_meet():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3, 4, 4]])  # blocks of 4: 0 0 0 1 | 1 2 3 3 | 4 4
    blocks = Blocks(torch.arange(3), size=4, length=10, axis=-1)
    assert blocks.mixed(documents).tolist() == [0, 1]
    parts = blocks.parts(documents)
    first, last, between = (
        list(zip(*bounds, strict=True)) for bounds in zip(flat(parts.lo), flat(parts.hi), strict=True)
    )
    assert first == [(0, 2), (4, 4), (8, 9)]
    assert last == [(3, 3), (6, 7), (8, 9)]
    assert between[1] == (5, 5)
    positions = parts.look_up(torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1, 0, 1]]))
    assert flat(positions.lo)[:2] == [[0, 1, 0], [0, 0, 0]]
    assert flat(positions.hi)[:2] == [[2, 1, 1], [0, 1, 1]]
    numbers = parts.look_up(documents)
    nobody = Interval(numbers.lo[:, 2], numbers.hi[:, 2]) == Interval(numbers.lo[:, 0], numbers.hi[:, 0])
    assert not nobody.hi.any()


def flat(x):
    """[1, 3, 1, 1, 1, blocks] as lists."""
    return x[0, :, 0, 0, 0].tolist()
