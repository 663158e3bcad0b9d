"""Lengths over steps, and settings that make no curriculum."""

from typing import Any

import pytest

from lctrain.data.curriculum import Curriculum, Fixed, Linear, Staged
from lctrain.errors import InputError

SHARES = [{"fraction": 0.25, "share": 0.25}, {"fraction": 0.5, "share": 0.25}, {"fraction": 1.0}]


def over(curriculum: Curriculum, num_steps: int, tokens_per_step: int = 1000) -> list[int]:
    return [curriculum.length_at(step, tokens_per_step) for step in range(num_steps)]


def test_fixed() -> None:
    assert over(Fixed(sequence_length=64), 3) == [64] * 3
    assert Fixed(sequence_length=64).lengths() == [64]


@pytest.mark.parametrize("target", [512, 4096, 131072])
def test_staged_by_shares_fits_any_target(target: int) -> None:
    staged = Staged(sequence_length=target, num_steps=8, stages=SHARES)
    assert over(staged, 10) == [target // 4] * 2 + [target // 2] * 2 + [target] * 6
    assert staged.lengths() == [target // 4, target // 2, target]


def test_staged_by_steps_and_tokens() -> None:
    stages = [{"sequence_length": 16, "steps": 2}, {"sequence_length": 32, "tokens": 2500}, {"sequence_length": 64}]
    assert over(Staged(sequence_length=64, num_steps=-1, stages=stages), 7) == [16, 16, 32, 32, 32, 64, 64]


def test_the_last_stage_goes_on() -> None:
    stages = [{"fraction": 0.5, "steps": 1}, {"fraction": 1.0, "steps": 1}]
    assert over(Staged(sequence_length=8, num_steps=4, stages=stages), 4) == [4, 8, 8, 8]


def test_linear_grows_in_few_equal_stages() -> None:
    linear = Linear(sequence_length=4096, start_fraction=0.25, num_lengths=4, num_steps=8, multiple_of=128)
    assert over(linear, 10) == [1024] * 2 + [2048] * 2 + [3072] * 2 + [4096] * 4
    assert linear.lengths() == [1024, 2048, 3072, 4096]


def test_linear_rounds_up_but_not_past_the_target() -> None:
    linear = Linear(sequence_length=1000, start_fraction=0.1, num_lengths=3, num_steps=3, multiple_of=256)
    assert linear.lengths() == [256, 768, 1000]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "empty"),
        ({"stages": [{"fraction": 1.0}, {"fraction": 1.0}]}, "only the last"),
        ({"stages": [{"fraction": 2.0}]}, r"\[128\] are not within 2..sequence_length=64"),
        ({"stages": [{"sequence_length": 65}]}, "65"),
        ({"stages": [{"sequence_length": 8, "fraction": 0.5}]}, "either"),
        ({"stages": [{"steps": 3}]}, "either"),
        ({"stages": [{"fraction": 0.5, "steps": 3, "tokens": 9}]}, "give one"),
        ({"stages": [{"fraction": 0.5, "steps": 0}]}, "positive"),
        ({"stages": [{"fraction": 0.5, "stepz": 3}]}, "has no stepz"),
        ({"stages": SHARES, "num_steps": -1}, "max_steps"),
    ],
)
def test_staged_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Staged(**{"sequence_length": 64, "num_steps": 10, **changes})


@pytest.mark.parametrize(
    "changes",
    [{"start_fraction": 0.0}, {"start_fraction": 1.5}, {"num_lengths": 1}, {"num_steps": 2}, {"multiple_of": 0}],
)
def test_linear_refuses(changes: dict[str, Any]) -> None:
    settings = {"sequence_length": 64, "start_fraction": 0.5, "num_lengths": 4, "num_steps": 8, "multiple_of": 1}
    with pytest.raises(InputError):
        Linear(**{**settings, **changes})
