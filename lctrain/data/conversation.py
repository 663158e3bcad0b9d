"""Encode conversations by the tokenizer's chat template and mark the answers, as only answers are trained on."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lctrain.data.corpus import Document, Message
from lctrain.errors import InputError

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_conversation(document: Document, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids, and a mask that is 1 for each id of an answer.

    If the template marks answers with `{% generation %}`, its marks are used. Otherwise an answer is the text that
    rendering the assistant's message adds after the generation prompt, its end-of-turn mark included.
    """
    if tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template, which conversations need; use an instruct model's")
    if GENERATION_TAG.search(str(tokenizer.chat_template)):
        marked: Any = tokenizer.apply_chat_template(
            list(document.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return marked["input_ids"], marked["assistant_masks"]
    text = _render(tokenizer, document.messages)
    answers = _answer_spans(document, text, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), answer_mask(encoded["offset_mapping"], answers)


def answer_mask(offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> list[int]:
    """Return 1 for each token that begins in one of `answers`, else 0; both are spans of characters."""
    begins = np.array([begin for begin, _ in offsets])
    within = np.zeros(len(begins), dtype=np.int8)
    for start, stop in answers:
        within |= (start <= begins) & (begins < stop)
    return within.tolist()


def _answer_spans(document: Document, text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Return the start and stop of each answer in the rendered `text`, in characters."""
    spans = []
    for i, message in enumerate(document.messages):
        if message["role"] != "assistant":
            continue
        asked = _render(tokenizer, document.messages[:i], add_generation_prompt=True)
        answered = _render(tokenizer, document.messages[: i + 1])
        if not (text.startswith(answered) and answered.startswith(asked)):
            raise InputError(
                f"{document.name}: the chat template renders a turn differently once others follow, so the answers "
                "cannot be told apart; mark them in the template with {% generation %}"
            )
        spans.append((len(asked), len(answered)))
    return spans


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    return str(
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
    )
