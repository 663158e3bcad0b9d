"""Make documents that hide a pass key in other text and ask for it (Mohtashami and Jaggi, arXiv:2305.16300)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lctrain.data.corpus import Corpus, Document
from lctrain.data.needle import HiddenFact
from lctrain.errors import InputError

PASS_KEY = "pass key"  # the label that evaluation uses
LABELS = (PASS_KEY, "magic number", "door code", "serial number", "ticket number", "account number", "lucky number")


def numbered(label: str, answer: str) -> HiddenFact:
    """Return a fact that states a number under `label`, with its question."""
    return HiddenFact(
        needle=f"\nThe {label} is {answer}. Remember it. {answer} is the {label}.\n",
        question=f"\nWhat is the {label}?",
        opening=f" The {label} is",
        answer=answer,
    )


def digits(rng: np.random.Generator, num_digits: int) -> str:
    """Return a uniformly drawn number of `num_digits` digits, without leading zero."""
    return str(rng.integers(10 ** (num_digits - 1), 10**num_digits))


@dataclass(frozen=True, kw_only=True)
class PasskeyCorpus(Corpus):
    """A corpus of recall documents made from the texts of another corpus.

    Each document takes consecutive lines of one haystack document, `min_characters` to `max_characters` long
    (log-uniform, at most the whole text), hides up to `max_needles` differently named numbers at random depths, and
    ends with questions and answers for all of them. It is a variant of its haystack document, so that held-out text
    stays held out.
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
        asked = [LABELS[i] for i in rng.permutation(len(LABELS))[:num_needles]]
        facts = [numbered(label, digits(rng, self.num_digits)) for label in asked]
        for fact in facts:
            lines.insert(int(rng.integers(len(lines) + 1)), fact.needle)
        questions = [facts[i] for i in rng.permutation(num_needles)]
        return "".join([*lines, *(f"{fact.question}{fact.opening} {fact.answer}." for fact in questions), "\n"])
