import pytest

from lctrain.evaluation.passkey import first_number


@pytest.mark.parametrize(("reply", "number"), [(" 123.", "123"), ("\n4", "4"), ("the 5", None), ("", None)])
def test_first_number(reply, number):
    assert first_number(reply) == number
