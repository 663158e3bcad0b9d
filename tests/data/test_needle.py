"""Prompts of needle tests: exact sizes, the needle at its depth, the chat template around them."""

import copy

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lctrain.data.needle import HiddenFact
from lctrain.errors import InputError

FACT = HiddenFact(needle="\nThe key is 7.\n", question="\nWhich key?", opening=" It is", answer="7")
HAYSTACK = np.full(500, 70, dtype=np.int32)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same with a chat template."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = TEMPLATE
    return chatty


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_tokens", [60, 333])
def test_prompt_has_exactly_the_tokens_asked_for(
    tokenizer: PreTrainedTokenizerFast, num_tokens: int, depth: float
) -> None:
    prompt = FACT.prompt(tokenizer, HAYSTACK, num_tokens=num_tokens, depth=depth)
    decoded = tokenizer.decode(prompt)
    assert len(prompt) == num_tokens
    assert decoded.startswith("<s>")
    assert decoded.endswith("\nWhich key? It is")
    before, behind = decoded.removeprefix("<s>").removesuffix("\nWhich key? It is").split(FACT.needle)
    assert len(before) == pytest.approx(depth * (len(before) + len(behind)), abs=0.5)


def test_a_chat_template_stands_around_the_haystack(chatty: PreTrainedTokenizerFast) -> None:
    prompt = FACT.prompt(chatty, HAYSTACK, num_tokens=100, depth=0.5, chat_template="default")
    decoded = chatty.decode(prompt)
    assert len(prompt) == 100
    assert decoded.startswith("<s>user: ")
    assert decoded.endswith("\nWhich key?</s>assistant:It is")
    assert prompt[0] == chatty.bos_token_id
    assert FACT.needle in decoded


def test_templates_go_by_their_names(chatty: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="chat_template=tool_use: the tokenizer has default"):
        FACT.prompt(chatty, HAYSTACK, num_tokens=100, depth=0.5, chat_template="tool_use")
    with pytest.raises(InputError, match="chat_template=default: the tokenizer has none"):
        FACT.prompt(tokenizer, HAYSTACK, num_tokens=100, depth=0.5, chat_template="default")
    chatty.chat_template = {"plain": TEMPLATE, "deaf": "nothing"}
    FACT.prompt(chatty, HAYSTACK, num_tokens=100, depth=0.5, chat_template="plain")
    with pytest.raises(InputError, match="chat_template=deaf leaves out what the user says"):
        FACT.prompt(chatty, HAYSTACK, num_tokens=100, depth=0.5, chat_template="deaf")


def test_prompt_without_room_or_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="without any text"):
        FACT.prompt(tokenizer, HAYSTACK, num_tokens=20, depth=0.5)
    with pytest.raises(InputError, match="tokens of text, got 500"):
        FACT.prompt(tokenizer, HAYSTACK, num_tokens=600, depth=0.5)
