import pytest

from lctrain.evaluation.passkey import first_number

CASES = {"passkey": ("passkey", {"lengths": [150, 320], "depths": [0.0, 0.5], "num_trials": 2})}
FIELDS = {
    "depths": [0.0, 1.0],
    "num_trials": 3,
    "heldout": False,
    "chat_template": "default",
    "seed": 1,
    "num_digits": 6,
}
REFUSED = [
    ({"lengths": [90, 320]}, "passkey at length 90: .* 99 tokens without any text, got 83"),
    ({"lengths": [150, 2000]}, "passkey at length 2000 .* there are 1231, 769 too few: .* heldout=false"),
]


@pytest.mark.parametrize(("reply", "number"), [(" 123.", "123"), ("\n4", "4"), ("the 5", None), ("", None)])
def test_first_number(reply, number):
    assert first_number(reply) == number
