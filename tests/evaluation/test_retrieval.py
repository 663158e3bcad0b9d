import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from lctrain.errors import InputError
from lctrain.evaluation.generation import wilson_interval
from lctrain.evaluation.passkey import Passkey

TASK = Passkey(
    lengths=[150, 320], sequence_length=320, batch_tokens=None, depths=[0.0, 0.5, 1.0], num_trials=3, heldout=True,
    chat_template=None, seed=0, num_digits=5,
)  # fmt: skip


def key(text):
    return re.search(r"The pass key is (\d+)\.", text)[1]


def test_an_oracle_recalls_everything(ask):
    result, prompts = ask(TASK, lambda text: f" {key(text)}.")
    assert result["by_length"] == {"150": 1.0, "320": 1.0}
    assert result["by_depth"]["320"] == {"0.0": 1.0, "0.5": 1.0, "1.0": 1.0}
    assert result["interval"]["150"][1] == pytest.approx(1.0)
    assert [length for length, _ in prompts] == [143] * 9 + [313] * 9  # the answer's seven tokens fit behind
    assert len(set(prompts)) == 18


@pytest.mark.parametrize("reply", [lambda _: " 00000", lambda text: f" {key(text)}1", lambda text: f" x{key(text)}"])
def test_anything_else_is_wrong(ask, reply):
    result, _ = ask(TASK, reply)
    assert set(result["by_length"].values()) == {0.0}


def test_depths_are_counted_apart(ask):
    late = lambda text: f" {key(text)}" if text.index("Remember") > len(text) * 0.6 else ""  # noqa: E731
    result, _ = ask(TASK, late)
    assert result["by_depth"]["320"] == {"0.0": 0.0, "0.5": 0.0, "1.0": 1.0}
    assert result["by_length"]["320"] == pytest.approx(1 / 3)


def test_trials_depend_on_seed_and_cell_alone(ask):
    reply = lambda _: ""  # noqa: E731
    _, prompts = ask(TASK, reply)
    _, fewer = ask(replace(TASK, lengths=[150], depths=[1.0], num_trials=2), reply)
    _, reseeded = ask(replace(TASK, seed=1), reply)
    assert set(fewer) < set(prompts)
    assert not set(reseeded) & set(prompts)


def test_no_prompt_holds_an_end_of_text(ask):
    _, prompts = ask(TASK, lambda _: "")
    assert not any("<eos>" in text or "<bos>" in text[5:] for _, text in prompts)


def test_digits_are_configured(ask):
    _, prompts = ask(replace(TASK, num_digits=9), lambda _: "")
    assert all(len(key(text)) == 9 for _, text in prompts)


def test_a_real_model_decodes_through_its_cache(model, tokenizer, documents, reader, measure):
    task = replace(TASK, lengths=[150], depths=[0.5])
    prompts = [task.trial(tokenizer, np.concatenate(documents), 150, 0.5, i).prompt for i in range(2)]
    ids = torch.from_numpy(np.stack(prompts))
    room = task.num_answer_tokens(tokenizer)
    for _ in range(room):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.batch_decode(ids[:, len(prompts[0]) :], skip_special_tokens=True)
    assert reader.complete(prompts, [room, room]) == expected
    assert measure(task, documents)["by_length"] == {"150": 0.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": [320, 150]}, "positive and ascending"),
        ({"depths": []}, "ascend from 0 to 1"),
        ({"depths": [0.5, 1.5]}, "ascend from 0 to 1"),
        ({"depths": [0.5, 0.5]}, "must ascend"),
        ({"batch_tokens": 319}, "batch_tokens=319 must hold a row of the longest length, 320"),
        ({"num_trials": 0}, "num_trials 0"),
        ({"num_digits": 19}, "num_digits 19"),
    ],
)
def test_refuses_settings(fields, message):
    with pytest.raises(InputError, match=message):
        replace(TASK, **fields)


def test_refuses_too_little_text(ask, tokenizer, documents):
    with pytest.raises(InputError, match=r"there are 101, 219 too few: .* heldout=false"):
        TASK.check([documents[0], documents[2]], tokenizer)
    with pytest.raises(InputError, match="there are 319, 1 too few"):  # 320 less the special tokens
        ask(TASK, lambda _: "", [documents[4][380:]])
    with pytest.raises(InputError, match=r"1 too few: .* give more of it"):
        ask(replace(TASK, heldout=False), lambda _: "", [documents[4][380:]])


def test_wilson_interval():
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
