"""Recall of a pass key hidden in other text (Mohtashami and Jaggi, arXiv:2305.16300): documents and prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lctrain.data.corpus import Corpus, Document
from lctrain.errors import InputError

PASS_KEY = "pass key"  # the wording that evaluation asks for
LABELS = (PASS_KEY, "magic number", "door code", "serial number", "ticket number", "account number", "lucky number")


def needle(label: str, answer: str) -> str:
    """The line that hides `answer` in the text."""
    return f"\nThe {label} is {answer}. Remember it. {answer} is the {label}.\n"


def question(label: str) -> str:
    """The end of a prompt, to be continued with a space and the answer."""
    return f"\nWhat is the {label}? The {label} is"


def digits(rng: np.random.Generator, num_digits: int) -> str:
    """A uniformly drawn number without leading zero."""
    return str(rng.integers(10 ** (num_digits - 1), 10**num_digits))


def passkey_prompt(
    tokenizer: PreTrainedTokenizerBase,
    haystack: npt.NDArray[np.int32],
    *,
    num_tokens: int,
    depth: float,
    num_digits: int,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.int64], str]:
    """Ids of a prompt of exactly `num_tokens` tokens, and the answer that should follow it.

    The needle stands `depth` (0 = start, 1 = end) of the way into the first haystack tokens. InputError where
    `num_tokens` has no room for needle and question, or the haystack is shorter than the prompt needs.
    """
    answer = digits(rng, num_digits)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    hidden = tokenizer.encode(needle(PASS_KEY, answer), add_special_tokens=False)
    asked = tokenizer.encode(question(PASS_KEY), add_special_tokens=False)
    room = num_tokens - len(start) - len(hidden) - len(asked)
    if room < 0:
        raise InputError(f"a pass key prompt needs {num_tokens - room} tokens without any text, got {num_tokens}")
    text = haystack[~np.isin(haystack, tokenizer.all_special_ids)][:room]
    if len(text) < room:
        raise InputError(f"a pass key prompt of {num_tokens} tokens needs {room} tokens of text, got {len(text)}")
    cut = round(depth * room)
    return np.concatenate([start, text[:cut], hidden, text[cut:], asked]).astype(np.int64), answer


@dataclass(frozen=True, kw_only=True)
class PasskeyCorpus(Corpus):
    """Recall documents made from the texts of another corpus.

    Each takes a run of lines of one haystack document, `min_characters` to `max_characters` long (log-uniform, up to
    what the document has), hides up to `max_needles` differently named numbers at random depths, and ends by asking
    for each of them. It is a variant of its haystack document, so held-out text stays held out.
    """

    haystack: Corpus
    num_documents: int
    min_characters: int
    max_characters: int
    max_needles: int = 3
    num_digits: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.min_characters <= self.max_characters:
            raise InputError(f"min_characters={self.min_characters} must be in 1..max_characters={self.max_characters}")
        if not 1 <= self.max_needles <= len(LABELS):
            raise InputError(f"max_needles={self.max_needles} must be in 1..{len(LABELS)}")
        if self.num_documents < 1 or self.num_digits < 1:
            raise InputError("num_documents and num_digits must be at least 1")

    def files(self) -> Sequence[Path]:
        return self.haystack.files()

    def size_hint(self) -> int:
        return self.num_documents

    def documents(self) -> Iterator[Document]:
        made = 0
        while True:
            before = made
            for source in self.haystack.documents():
                if len(source.text) < self.min_characters:
                    continue
                rng = np.random.default_rng((self.seed, made))
                yield Document(name=f"{source.source}#passkey-{made}", text=self._hide(source.text, rng))
                made += 1
                if made == self.num_documents:
                    return
            if made == before:
                raise InputError(f"no haystack document has min_characters={self.min_characters} characters")

    def _hide(self, text: str, rng: np.random.Generator) -> str:
        longest = min(self.max_characters, len(text))
        size = min(longest, round(np.exp(rng.uniform(np.log(self.min_characters), np.log(longest)))))
        start = text.rfind("\n", 0, int(rng.integers(len(text) - size + 1))) + 1
        lines = text[start : start + size].splitlines(keepends=True)
        num_needles = int(rng.integers(1, self.max_needles + 1))
        facts = {LABELS[i]: digits(rng, self.num_digits) for i in rng.permutation(len(LABELS))[:num_needles]}
        for label, answer in facts.items():
            lines.insert(int(rng.integers(len(lines) + 1)), needle(label, answer))
        labels = [list(facts)[i] for i in rng.permutation(num_needles)]
        return "".join([*lines, *(f"{question(label)} {facts[label]}." for label in labels), "\n"])
