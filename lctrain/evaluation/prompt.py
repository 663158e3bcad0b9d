"""Make the token ids of a prompt from text, with or without a chat template."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from lctrain.data.needle import named_template
from lctrain.evaluation.base import Tokens


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, opening: str = "", *, chat_template: str | None = None
) -> Tokens:
    """Return the ids of a prompt: `text`, then `opening`, with which the answer begins.

    Without a chat template, the tokenizer's start token comes first, if there is one. Under the template of this name
    (default, if the tokenizer has only one), `text` is the user's message and `opening` begins the assistant's.
    """
    return np.array(
        [*start_ids(tokenizer, chat_template), *text_ids(tokenizer, text, opening, chat_template)], np.int64
    )


def start_ids(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> list[int]:
    """Return the start token, or nothing where there is none, or where the chat template writes its own."""
    return [] if chat_template or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def text_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, opening: str = "", chat_template: str | None = None
) -> list[int]:
    """Return the ids of a prompt after its start token."""
    if chat_template is not None:
        text = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                chat_template=named_template(tokenizer, chat_template),
                tokenize=False,
                add_generation_prompt=True,
            )
        )
    return list(tokenizer.encode(text + opening, add_special_tokens=False, verbose=False))
