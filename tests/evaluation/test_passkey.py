import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from lctrain.errors import InputError
from lctrain.evaluation.passkey import Passkey, first_number, wilson_interval

TASK = Passkey(lengths=[150, 320], sequence_length=320, depths=[0.0, 0.5, 1.0], num_trials=3, num_digits=5, seed=0)


class Stub:
    """Answers every prompt with `reply(prompt text)` and keeps what it was asked."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, reply):
        self.tokenizer, self.reply, self.prompts = tokenizer, reply, []

    def generate(self, input_ids, attention_mask, generation_config):
        texts = self.tokenizer.batch_decode(input_ids)
        self.prompts += [(len(ids), text) for ids, text in zip(input_ids, texts, strict=True)]
        room = generation_config.max_new_tokens
        replies = [self.tokenizer.encode(self.reply(text).ljust(room)[:room]) for text in texts]
        return torch.cat([input_ids, torch.tensor(replies)], dim=1)


def run(task, tokenizer, documents, reply):
    stub = Stub(tokenizer, reply)
    return task.run(stub, tokenizer, documents, lambda *_: None), stub.prompts


def key(text):
    return re.search(r"The pass key is (\d+)\.", text)[1]


def test_an_oracle_recalls_everything(tokenizer, documents):
    result, prompts = run(TASK, tokenizer, documents, lambda text: f" {key(text)}.")
    assert result["by_length"] == {"150": 1.0, "320": 1.0}
    assert result["by_depth"]["320"] == {"0.0": 1.0, "0.5": 1.0, "1.0": 1.0}
    assert result["interval"]["150"][1] == pytest.approx(1.0)
    assert [length for length, _ in prompts] == [143] * 9 + [313] * 9  # the answer's seven tokens fit behind
    assert len(set(prompts)) == 18


@pytest.mark.parametrize("reply", [lambda _: " 00000", lambda text: f" {key(text)}1", lambda text: f" x{key(text)}"])
def test_anything_else_is_wrong(tokenizer, documents, reply):
    result, _ = run(TASK, tokenizer, documents, reply)
    assert set(result["by_length"].values()) == {0.0}


def test_depths_are_counted_apart(tokenizer, documents):
    late = lambda text: f" {key(text)}" if text.index("Remember") > len(text) * 0.6 else ""  # noqa: E731
    result, _ = run(TASK, tokenizer, documents, late)
    assert result["by_depth"]["320"] == {"0.0": 0.0, "0.5": 0.0, "1.0": 1.0}
    assert result["by_length"]["320"] == pytest.approx(1 / 3)


def test_trials_depend_on_seed_and_cell_alone(tokenizer, documents):
    reply = lambda _: ""  # noqa: E731
    _, prompts = run(TASK, tokenizer, documents, reply)
    _, fewer = run(replace(TASK, lengths=[150], depths=[1.0], num_trials=2), tokenizer, documents, reply)
    _, reseeded = run(replace(TASK, seed=1), tokenizer, documents, reply)
    assert set(fewer) < set(prompts)
    assert not set(reseeded) & set(prompts)


def test_no_prompt_holds_an_end_of_text(tokenizer, documents):
    _, prompts = run(TASK, tokenizer, documents, lambda _: "")
    assert not any("<eos>" in text or "<bos>" in text[5:] for _, text in prompts)


def test_digits_are_configured(tokenizer, documents):
    _, prompts = run(replace(TASK, num_digits=9), tokenizer, documents, lambda _: "")
    assert all(len(key(text)) == 9 for _, text in prompts)


def test_a_real_model_decodes_through_its_cache(model, tokenizer, documents):
    task = replace(TASK, lengths=[150], depths=[0.5])
    prompts = [task.trial(tokenizer, np.concatenate(documents), 150, 0.5, i)[0] for i in range(2)]
    ids = torch.from_numpy(np.stack(prompts))
    for _ in range(task.num_answer_tokens):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.batch_decode(ids[:, len(prompts[0]) :], skip_special_tokens=True)
    assert task.complete(model, tokenizer, prompts) == expected
    assert task.run(model, tokenizer, documents, lambda *_: None)["by_length"] == {"150": 0.0}


def test_progress_adds_up(tokenizer, documents):
    units = []
    TASK.run(Stub(tokenizer, lambda _: ""), tokenizer, documents, lambda _, num_units: units.append(num_units))
    assert sum(units) == TASK.num_units()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": [320, 150]}, "positive and ascending"),
        ({"depths": []}, "from 0 to 1"),
        ({"depths": [0.5, 1.5]}, "from 0 to 1"),
        ({"num_trials": 0}, "num_trials 0"),
        ({"num_digits": 19}, "num_digits 19"),
    ],
)
def test_refuses_settings(fields, message):
    with pytest.raises(InputError, match=message):
        replace(TASK, **fields)


def test_refuses_too_little_text(tokenizer, documents):
    with pytest.raises(InputError, match="there are 101"):
        TASK.check([documents[0], documents[2]])
    with pytest.raises(InputError, match="there are 319"):  # 320 less the special tokens
        run(TASK, tokenizer, [documents[4][380:]], lambda _: "")


@pytest.mark.parametrize(("reply", "number"), [(" 123.", "123"), ("\n4", "4"), ("the 5", None), ("", None)])
def test_first_number(reply, number):
    assert first_number(reply) == number


def test_wilson_interval():
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
