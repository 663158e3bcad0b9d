"""Make the prompts of needle tests: a fact hidden in a haystack, and a question for the fact after it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lctrain.errors import InputError

_CONTENT = "THE-HAYSTACK"  # placeholder for the haystack while a chat template is rendered


@dataclass(frozen=True, kw_only=True)
class HiddenFact:
    """A fact to hide: a prompt is the haystack with `needle` in it, then `question` and `opening`, and `answer` should
    follow.
    """

    needle: str
    question: str
    opening: str
    answer: str

    def prompt(
        self,
        tokenizer: PreTrainedTokenizerBase,
        haystack: npt.NDArray[np.int32],
        *,
        num_tokens: int,
        depth: float,
        chat_template: str | None = None,
    ) -> npt.NDArray[np.int64]:
        """Return a prompt of exactly `num_tokens` ids, with the needle at `depth` (0 = start, 1 = end) of the haystack.

        The haystack is cut to the tokens that the rest leaves. Under a chat template, haystack and question are the
        user's message, and `opening` begins the assistant's. Raises InputError if `num_tokens` is too few for the rest,
        or the haystack is too short.
        """
        before, behind = self._frame(tokenizer, chat_template)
        hidden = tokenizer.encode(self.needle, add_special_tokens=False)
        room = num_tokens - len(before) - len(hidden) - len(behind)
        if room < 0:
            raise InputError(f"a needle's prompt needs {num_tokens - room} tokens without any text, got {num_tokens}")
        text = haystack[:room]
        if len(text) < room:
            raise InputError(f"a needle's prompt of {num_tokens} tokens needs {room} tokens of text, got {len(text)}")
        cut = round(depth * room)
        return np.concatenate([before, text[:cut], hidden, text[cut:], behind]).astype(np.int64)

    def _frame(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> tuple[list[int], list[int]]:
        """Return the ids before and behind the haystack."""
        if chat_template is None:
            start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            return start, tokenizer.encode(self.question + self.opening, add_special_tokens=False)
        message = {"role": "user", "content": _CONTENT + self.question}
        rendered = tokenizer.apply_chat_template(
            [message],
            chat_template=named_template(tokenizer, chat_template),
            tokenize=False,
            add_generation_prompt=True,
        )
        before, found, behind = str(rendered).partition(_CONTENT)
        if not found:
            raise InputError(f"chat_template={chat_template} leaves out what the user says")
        parts = (before, behind + self.opening.lstrip())
        start, end = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
        return start, end


def named_template(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """Return the tokenizer's chat template of this name; a single unnamed template is called default."""
    own = tokenizer.chat_template
    templates = own if isinstance(own, dict) else {"default": own} if own else {}
    if not templates:
        raise InputError(f"chat_template={name}: the tokenizer has none; use chat_template=null or an instruct model's")
    if name not in templates:
        raise InputError(f"chat_template={name}: the tokenizer has {', '.join(templates)}")
    return str(templates[name])
