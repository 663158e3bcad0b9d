import re
from dataclasses import replace

import pytest

from lctrain.errors import InputError
from lctrain.evaluation.needle import Needle, words

TASK = Needle(
    lengths=[200, 400], sequence_length=400, batch_tokens=None, depths=[0.0, 1.0], num_trials=2, heldout=True,
    chat_template=None, seed=0, needle="\nThe cat sleeps on a red sofa.\n", question="\nWhere is the cat?",
    opening=" The cat sleeps", answer="on a red sofa",
)  # fmt: skip

CASES = {
    "needle": (
        "single_needle",
        {"lengths": [200, 400], "depths": [0.0, 1.0], "num_trials": 2, "needle": TASK.needle, "question": TASK.question,
         "opening": TASK.opening, "answer": TASK.answer},
    )
}  # fmt: skip
FIELDS = {
    "depths": [0.0, 0.5], "num_trials": 3, "heldout": True, "chat_template": "default", "seed": 1,
    "needle": "\nThe old cat sleeps on a red sofa.\n", "question": "\nWhere does it sleep?", "opening": " It sleeps",
    "answer": "red sofa",
}  # fmt: skip
REFUSED = [
    ({"lengths": [70, 400]}, "needle at length 70: a needle's prompt needs"),
    ({"lengths": [200, 9000]}, "needle at length 9000 hides its needle in text of as many tokens"),
    ({"chat_template": "tools"}, "chat_template=tools: the tokenizer has default"),
]


def test_an_oracle_recalls_everything(ask):
    result, prompts = ask(TASK, lambda text: re.search(r"sleeps( on.*\.)\n", text)[1] + " And")
    assert result["by_length"] == {"200": 1.0, "400": 1.0}
    assert all(text.endswith("\nWhere is the cat? The cat sleeps") for _, text in prompts)
    assert [length for length, _ in prompts] == [182] * 4 + [382] * 4  # fourteen letters and four tokens more


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (" on a red sofa", True),
        (' "On the red sofa!"', True),
        (" on red sofa. So", True),
        (" on a red sofas", False),
        (" not on a red sofa", False),
        (" on a red", False),
        ("", False),
    ],
)
def test_words_must_match(reply, right):
    assert TASK.is_recalled(reply, TASK.answer) is right


def test_words():
    assert words(" The Élan, an A-b_c\n(d).") == ["élan", "abc", "d"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": ""}, "holds no word"),
        ({"answer": "The ..."}, "holds no word"),
        ({"answer": "on a blue sofa"}, "does not hold its answer"),
    ],
)
def test_refuses_what_can_not_be_recalled(fields, message):
    with pytest.raises(InputError, match=message):
        replace(TASK, **fields)
