"""Conversations: the loss falls on the answers and nowhere else, whatever the template; bad ones are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lctrain.data.chat import ChatJsonl
from lctrain.data.datamodule import LongContextData
from lctrain.data.tokenize import tokenize
from lctrain.errors import InputError

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
TAGGED = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
REWRITING = PLAIN.replace("{{ m['content'] }}", "{% if loop.last %}final {% endif %}{{ m['content'] }}")
TURNS = [("system", "Be brief."), ("user", "Äh?"), ("assistant", "One."), ("user", "And?"), ("assistant", "Two.")]


def messages(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def chat(path: Path, *rows: dict[str, Any], **changes: Any) -> ChatJsonl:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"messages_field": "messages", "prompt_fields": [], "response_field": None, **changes}
    return ChatJsonl(path=str(path), **settings)


@pytest.mark.parametrize("template", [PLAIN, TAGGED])
def test_only_answers_are_predicted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    tokenizer.chat_template = template
    table = tokenize(chat(tmp_path / "a.jsonl", messages(*TURNS)), tokenizer, tmp_path)
    tokens, mask = table.tokens(0), table.loss_mask(0)
    assert mask is not None
    assert len(mask) == len(tokens)
    assert tokenizer.decode(tokens[mask == 1]) == "One.</s>Two.</s>"
    assert tokenizer.decode(tokens).count("<s>") == 1


def test_labels_are_the_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, build_data: Callable[..., LongContextData]
) -> None:
    tokenizer.chat_template = TAGGED
    rows = [messages(("user", f"Question {i}?"), ("assistant", f"Answer {i}.")) for i in range(20)]
    data = build_data(corpus=chat(tmp_path / "a.jsonl", *rows), packing="whole")
    batch = next(iter(data.train_dataloader()))
    labels = batch["labels"]
    answers = tokenizer.decode(labels[labels != -100]).split("</s>")
    assert answers.pop() == ""
    assert all(answer.startswith("Answer ") and answer.endswith(".") for answer in answers)
    assert batch["num_valid_tokens"] == int((labels != -100).sum())


def test_prompt_and_response_columns(tmp_path: Path) -> None:
    row = {"instruction": "Sum up.", "input": "Long text.", "output": "Short."}
    columns = {"messages_field": None, "prompt_fields": ["instruction", "input"], "response_field": "output"}
    full, bare = chat(tmp_path / "a.jsonl", row, {**row, "input": ""}, **columns).documents()
    assert [m["content"] for m in full.messages] == ["Sum up.\n\nLong text.", "Short."]
    assert [m["content"] for m in bare.messages] == ["Sum up.", "Short."]
    with pytest.raises(InputError, match=r"a\.jsonl:1: no field 'output'"):
        list(chat(tmp_path / "a.jsonl", {"instruction": "x"}, **columns).documents())
    with pytest.raises(InputError, match=r"a\.jsonl:1: none of instruction, input"):
        list(chat(tmp_path / "a.jsonl", {"output": "x"}, **columns).documents())


@pytest.mark.parametrize(
    "changes",
    [
        {"messages_field": None},
        {"prompt_fields": ["instruction"], "response_field": "output"},
        {"prompt_fields": ["instruction"]},
        {"messages_field": None, "response_field": "output"},
        {"errors": "ignore"},
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        chat(tmp_path / "a.jsonl", **changes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "no field 'messages'; it has 'text'"),
        ({"messages": "hello"}, "must be a list"),
        (messages(), "roles none"),
        (messages(("user", "x")), "answer last"),
        (messages(("assistant", "x")), "user and assistant in turn"),
        (messages(("user", "x"), ("system", "y"), ("assistant", "z")), "user and assistant in turn"),
        (messages(("user", "x"), ("assistant", "y"), ("assistant", "z")), "user and assistant in turn"),
        (messages(("human", "x"), ("gpt", "y")), "role 'human'; known are system, user, assistant"),
        ({"messages": [{"role": "user", "content": None}]}, "no text as content"),
    ],
)
def test_bad_conversations_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"a\.jsonl:2: .*{message}"):
        list(chat(tmp_path / "a.jsonl", messages(*TURNS), row).documents())


def test_a_tokenizer_without_chat_template_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="no chat template"):
        tokenize(chat(tmp_path / "a.jsonl", messages(*TURNS)), tokenizer, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_a_template_whose_answers_cannot_be_found_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = REWRITING
    with pytest.raises(InputError, match="% generation %"):
        tokenize(chat(tmp_path / "a.jsonl", messages(*TURNS)), tokenizer, tmp_path / "cache")
