"""Hide several long pass keys in one text and ask for all of them at its end.

From DuoAttention (Xiao et al., arXiv:2410.10819, §2.3).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lctrain.data.corpus import Corpus, Document
from lctrain.errors import InputError

WORDS = (  # the radiotelephony alphabet: no word can be guessed from the words before it
    *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima"),
    *("mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey"),
    *("xray", "yankee", "zulu"),
)
ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
    *("eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth"),
    *("nineteenth", "twentieth"),
)


def needle(ordinal: str, passkey: str) -> str:
    """Return the paragraph that states a pass key."""
    return f"\n\nKeep this in mind: the {ordinal} passkey is {passkey}.\n\n"


def question(ordinal: str) -> str:
    """Return the question for a pass key, to be continued with a space and the pass key."""
    return f"\nWhich words were the {ordinal} passkey? The {ordinal} passkey is"


@dataclass(frozen=True, kw_only=True)
class MultiPasskeyCorpus(Corpus):
    """A corpus whose answers can be predicted only from text read far before, which shows the heads that retrieve.

    The documents take from the haystack, in turn, one of `num_lengths` numbers of characters, evenly spaced from
    `min_characters` to `max_characters`. Each hides `num_passkeys` pass keys of `passkey_words` words, at depths drawn
    from `num_depths` depths that are evenly spaced from `min_depth` to `max_depth` of its haystack. Only the answers
    are predicted; with `include_questions`, the questions as well, as in the authors' code.

    Deviations: lengths are in characters, without pass keys and questions, so that they do not depend on a tokenizer;
    the authors' are in tokens. If a source is too short, a haystack goes on with the following sources and is named
    after the first.
    """

    haystack: Corpus
    num_documents: int
    num_passkeys: int
    passkey_words: int
    min_characters: int
    max_characters: int
    num_lengths: int
    min_depth: float
    max_depth: float
    num_depths: int
    include_questions: bool
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.min_characters <= self.max_characters:
            raise InputError(f"min_characters={self.min_characters} must be in 1..max_characters={self.max_characters}")
        if not 1 <= self.num_passkeys <= len(ORDINALS):
            raise InputError(f"num_passkeys={self.num_passkeys} must be in 1..{len(ORDINALS)}")
        if self.num_depths < self.num_passkeys:
            raise InputError(f"num_depths={self.num_depths} are too few for num_passkeys={self.num_passkeys}")
        if not 0 <= self.min_depth <= self.max_depth <= 1:
            raise InputError(f"min_depth={self.min_depth}, max_depth={self.max_depth} must ascend within 0 and 1")
        if min(self.num_documents, self.num_lengths, self.passkey_words) < 1:
            raise InputError("num_documents, num_lengths and passkey_words must be at least 1")

    def files(self) -> Sequence[Path]:
        return self.haystack.files()

    def size_hint(self) -> int:
        return self.num_documents

    def documents(self) -> Iterator[Document]:
        for i, (source, text) in enumerate(islice(self._haystacks(), self.num_documents)):
            yield self._hide(f"{source}#multi_passkey-{i}", text, np.random.default_rng((self.seed, i)))

    def _haystacks(self) -> Iterator[tuple[str, str]]:
        """Yield source and text of endless haystacks, with the scheduled lengths in turn."""
        lengths = cycle(np.linspace(self.min_characters, self.max_characters, self.num_lengths).astype(int).tolist())
        length, names, text = next(lengths), list[str](), ""
        while True:
            before = len(text)
            for document in self.haystack.documents():
                names, text = [*names, document.source], text + document.text
                if len(text) >= length:
                    yield names[0], text[:length]
                    length, names, text, before = next(lengths), [], "", -1
            if len(text) == before:
                raise InputError("the haystack of the multi_passkey corpus holds no text")

    def _hide(self, name: str, text: str, rng: np.random.Generator) -> Document:
        depths = np.linspace(self.min_depth, self.max_depth, self.num_depths)
        chosen: npt.NDArray[np.float64] = np.sort(rng.choice(depths, self.num_passkeys, replace=False))
        cuts = [0, *np.round(chosen * len(text)).astype(int).tolist(), len(text)]
        passkeys = [" ".join(rng.choice(WORDS, self.passkey_words)) for _ in chosen]
        ordinals = ORDINALS[: self.num_passkeys]
        whole = text[: cuts[1]]
        for i, (ordinal, passkey) in enumerate(zip(ordinals, passkeys, strict=True)):
            whole += needle(ordinal, passkey) + text[cuts[i + 1] : cuts[i + 2]]
        answers = []
        for ordinal, passkey in zip(ordinals, passkeys, strict=True):
            begin = len(whole) + (0 if self.include_questions else len(question(ordinal)))
            whole += f"{question(ordinal)} {passkey}"
            answers.append((begin, len(whole)))
            whole += ".\n"
        return Document(name=name, text=whole, answers=answers)
