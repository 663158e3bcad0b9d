"""Needle in a haystack (Kamradt 2023, github.com/gkamradt/LLMTest_NeedleInAHaystack): recall of one hidden sentence."""

import re
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lctrain.data.needle import HiddenFact
from lctrain.errors import InputError
from lctrain.evaluation.retrieval import Retrieval

_SLACK = 4  # tokens, for a quotation mark before the answer, the end after it, and a word that is tokenized differently


@dataclass(frozen=True, kw_only=True)
class Needle(Retrieval):
    """A task that hides `needle`, asks `question` after the haystack and begins the answer with `opening`.

    Exact match: the words of the reply must begin with the words of `answer`, both in lower case and without
    punctuation and the articles a, an and the (SQuAD's normalisation, Rajpurkar et al., arXiv:1606.05250). Deviation:
    Kamradt lets another model grade the replies from 1 to 10.
    """

    needle: str
    question: str
    opening: str
    answer: str

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted, told = words(self.answer), words(self.needle)
        if not wanted:
            raise InputError(f"needle answer {self.answer!r} holds no word to compare a reply with")
        if not any(told[i : i + len(wanted)] == wanted for i in range(len(told))):
            raise InputError(
                f"needle {self.needle!r} does not hold its answer {self.answer!r}: nothing could be recalled"
            )

    def draw(self, rng: np.random.Generator) -> HiddenFact:
        return HiddenFact(needle=self.needle, question=self.question, opening=self.opening, answer=self.answer)

    def is_recalled(self, reply: str, answer: str) -> bool:
        wanted = words(answer)
        return words(reply)[: len(wanted)] == wanted

    def num_answer_tokens(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return len(tokenizer.encode(f" {self.answer}", add_special_tokens=False)) + _SLACK


def words(text: str) -> list[str]:
    """Return the words of `text` in lower case, without punctuation and articles."""
    return [word for word in re.sub(r"[^\w\s]|_", "", text.casefold()).split() if word not in ("a", "an", "the")]
