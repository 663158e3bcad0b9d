"""Equal values mean the same mask; what is more than its values equals nothing."""

from collections import namedtuple
from dataclasses import InitVar, dataclass, field, make_dataclass
from enum import Enum
from functools import cached_property

import pytest
import torch

from lctrain.attention.identity import kind, value
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.attention.streaming import StreamingAttention

Side = Enum("Side", "LEFT RIGHT")


@dataclass(frozen=True)
class Frozen:
    held: object
    unseen: object = field(default=0, repr=False, compare=False)

    @cached_property
    def table(self):
        return torch.arange(3)


@dataclass(frozen=True)
class Derived(Frozen):
    """A method of the same fields."""


class Undeclared(Frozen):
    """Holds what its fields do not tell."""

    def __init__(self, held, more):
        super().__init__(held)
        object.__setattr__(self, "more", more)


@dataclass(frozen=True)
class Initialized:
    width: InitVar[int]

    def __post_init__(self, width):
        object.__setattr__(self, "kept", width)


@pytest.mark.parametrize(
    "held", [3, 0.5, "causal", None, True, Side.LEFT, (1, (2, 3)), [4, 8], {"a": [1]}, Frozen(2)], ids=repr
)
def test_values_are_alike_where_they_are_equal(held):
    one, other = Frozen(held), Frozen(held)
    _ = one.table  # what is cached follows from the fields
    assert value(one) == value(other) != value(Frozen("another"))
    assert kind(one) == kind(other)
    assert hash(value(one)) == hash(value(other))


def test_a_class_a_type_and_a_field_that_no_repr_shows_tell_apart():
    found = [
        Frozen(1), Derived(1), Frozen(1.0), Frozen(True), Frozen("1"), Frozen((1,)), Frozen([1]), Frozen(1, unseen=2),
        make_dataclass("Frozen", ["held", "unseen"], frozen=True)(1, 0),
    ]  # fmt: skip
    assert len({value(each) for each in found}) == len(found)


def test_a_list_is_what_it_holds_now():
    """Whoever changes one between two layers changes the mask of the second."""
    pattern = SlidingWindowAttention(sliding_window=[4, 8])
    before = value(pattern)
    pattern.sliding_window[0] = 6
    assert before != value(pattern) == value(SlidingWindowAttention(sliding_window=[6, 8]))


@pytest.mark.parametrize(
    "pattern",
    [
        Frozen(torch.ones(1)),
        Frozen((1, [torch.tensor(2)])),
        Frozen(1, unseen=torch.ones(1)),
        Frozen(lambda: 1),
        Frozen(object()),
        Frozen({torch.ones(1): 2}),
        Frozen(Frozen(torch.ones(1))),
        Undeclared(1, torch.ones(1)),
        Initialized(4),
        make_dataclass("Mutable", ["width"])(4),
        make_dataclass("Compared", ["width"], eq=False)(4),
        namedtuple("Named", "width")(torch.ones(1)),
        object(),
    ],
    ids=lambda pattern: type(pattern).__name__,
)
def test_what_is_more_than_its_values_equals_nothing(pattern):
    assert value(pattern) is None
    assert kind(pattern) != kind(pattern)


def test_patterns_of_several_layers_share_their_mask():
    streaming = [StreamingAttention(num_sink_tokens=2, recent_size=size) for size in (4, 4, 5)]
    assert value(streaming[0]) == value(streaming[1]) != value(streaming[2])
