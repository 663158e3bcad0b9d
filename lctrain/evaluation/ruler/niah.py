"""RULER's needles in a haystack: numbers or uuids under keys, in noise, in text, or among other needles.

Its tasks niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue and niah_multiquery are settings of one class.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from random import Random
from typing import Literal, NamedTuple
from uuid import UUID

from transformers import PreTrainedTokenizerBase

from lctrain.errors import InputError
from lctrain.evaluation.base import Texts, Tokens
from lctrain.evaluation.ruler.base import Draw, Ruler, Sample
from lctrain.evaluation.ruler.words import word_pairs

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type} for {key} is: {value}."


class Template(NamedTuple):
    """The text of a prompt, and the words that begin its answer."""

    text: str
    opening: str


ONE = Template(
    text="A special magic {type} is hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {type} afterwards.\n{context}\nWhat is the special magic {type} for {query} mentioned in the provided text?",
    opening=" The special magic {type} for {query} mentioned in the provided text is",
)
SEVERAL = Template(
    text="Some special magic {type} are hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {type} afterwards.\n{context}\nWhat are all the special magic {type} for {query} mentioned in the "
    "provided text?",
    opening=" The special magic {type} for {query} mentioned in the provided text are",
)
DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent of an essay's sentences

Haystack = Callable[[Random, int, Sequence[str]], str]
"""(random numbers, size, needles) → the text in which the needles are hidden."""


KINDS = ("words", "numbers", "uuids")
CHOICES = {"type_haystack": ("noise", "essay", "needle"), "type_needle_k": KINDS, "type_needle_v": KINDS}


@dataclass(frozen=True, kw_only=True)
class Niah(Ruler):
    """A task that hides `num_needle_v` values under each of `num_needle_k` keys and asks for those of `num_needle_q`.

    A haystack of `noise` repeats five short sentences, one of type `needle` holds other keys and values, and an `essay`
    is the words of the corpus from its beginning, repeated if they are too few. Keys of type `words` are pairs of the
    lists in the folder `words`; None means lctrain's own, of which one in 200 recurs with another value among 6,000
    needles. RULER's lists are the folder `assets` of the package wonderwords. Deviations: RULER's essays are Paul
    Graham's, and NLTK divides them into sentences.
    """

    type_haystack: Literal["noise", "essay", "needle"]
    type_needle_k: Literal["words", "numbers", "uuids"]
    type_needle_v: Literal["words", "numbers", "uuids"]
    num_needle_k: int
    num_needle_v: int
    num_needle_q: int
    words: str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{self.name} {name}={getattr(self, name)} is none of {', '.join(choices)}")
        if min(self.num_needle_k, self.num_needle_v, self.num_needle_q) < 1:
            raise InputError(f"{self.name} num_needle_k, num_needle_v and num_needle_q must be positive")
        if self.words is not None and "words" not in (self.type_needle_k, self.type_needle_v):
            raise InputError(f"{self.name} words={self.words}: neither keys nor values are words")
        most = len(DEPTHS) if self.type_haystack == "essay" else self.step(self.context_lengths[0])
        if self.num_keys * self.num_needle_v > most:
            raise InputError(
                f"{self.name} hides {self.num_keys * self.num_needle_v} needles, which must be at most {most}"
            )

    @property
    def num_keys(self) -> int:
        """Return the number of hidden keys: at least as many as are asked for."""
        return max(self.num_needle_k, self.num_needle_q)

    def documents(self, texts: Texts) -> Sequence[Tokens]:
        return texts.documents() if self.type_haystack == "essay" else ()

    def step(self, length: int) -> int:
        if self.type_haystack == "essay":
            return 500
        return 25 if length >= 4096 else 5

    def prepare(self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Tokens]) -> Draw:
        key, value = self.drawn(self.type_needle_k), self.drawn(self.type_needle_v)
        haystack = self.haystack(key, value, tokenizer, documents)

        def draw(rng: Random, size: int) -> Sample:
            facts = [(key(rng), [value(rng) for _ in range(self.num_needle_v)]) for _ in range(self.num_keys)]
            needles = [self.needle(name, each) for name, values in facts for each in values]
            Random(self.seed).shuffle(needles)  # the same order in every sample, as in RULER
            context = haystack(rng, size, needles)
            return self.ask(rng.sample(facts, self.num_needle_q), context)

        return draw

    def ask(self, facts: Sequence[tuple[str, Sequence[str]]], context: str) -> Sample:
        """Return the sample that asks for the values of these keys."""
        *others, last = (key for key, _ in facts)
        query = f"{', '.join(others)}, and {last}" if others else last
        references = [value for _, values in facts for value in values]
        template, kind = (SEVERAL, self.type_needle_v) if len(references) > 1 else (ONE, self.type_needle_v[:-1])
        text, opening = (part.format(type=kind, query=query, context=context) for part in template)
        return Sample(text, opening, references)

    def needle(self, key: str, value: str) -> str:
        """Return the sentence that states a value under a key."""
        return NEEDLE.format(type=self.type_needle_v, key=key, value=value)

    def drawn(self, kind: str) -> Callable[[Random], str]:
        """Return the function that draws a key or a value."""
        if kind == "words":
            pairs = word_pairs(self.words)
            return lambda rng: rng.choice(pairs)
        return {"numbers": number, "uuids": uuid}[kind]

    def haystack(
        self,
        key: Callable[[Random], str],
        value: Callable[[Random], str],
        tokenizer: PreTrainedTokenizerBase,
        documents: Sequence[Tokens],
    ) -> Haystack:
        """Return the function that makes a haystack with needles in it."""
        if self.type_haystack == "needle":
            return lambda rng, size, needles: among(
                rng, needles, [self.needle(key(rng), value(rng)) for _ in range(size)]
            )
        if self.type_haystack == "noise":
            return lambda rng, size, needles: among(rng, needles, [NOISE] * size)
        words = essay(tokenizer, documents, 3 * self.context_lengths[-1])
        return lambda rng, size, needles: in_text(rng, needles, " ".join(islice(cycle(words), size)))


def number(rng: Random) -> str:
    """Return a random number of seven digits."""
    return str(rng.randint(10**6, 10**7 - 1))


def uuid(rng: Random) -> str:
    """Return a random UUID of version 4."""
    return str(UUID(int=rng.getrandbits(128), version=4))


def among(rng: Random, needles: Sequence[str], lines: list[str]) -> str:
    """Return the lines with the needles among them, the first needle latest."""
    places = sorted(rng.sample(range(len(lines)), len(needles)), reverse=True)
    for place, needle in zip(places, needles, strict=True):
        lines.insert(place, needle)
    return "\n".join(lines)


def in_text(rng: Random, needles: Sequence[str], text: str) -> str:
    """Return the text with the needles between its sentences, the first needle earliest."""
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    depths = sorted(rng.sample(DEPTHS, len(needles)))
    ends = [int(len(sentences) * (depth / 100)) for depth in depths]
    parts = [" ".join(sentences[start:end]) for start, end in zip([0, *ends], [*ends, len(sentences)], strict=True)]
    return " ".join([*chain.from_iterable(zip(parts[:-1], needles, strict=True)), parts[-1]])


def essay(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Tokens], num_words: int) -> list[str]:
    """Return at least `num_words` words from the beginning of the documents, or all there are."""
    words: list[str] = []
    for document in documents:
        words += str(tokenizer.decode(document, skip_special_tokens=True)).split()
        if len(words) >= num_words:
            break
    if not words:
        raise InputError("an essay haystack needs text, and the corpus has none")
    return words
