"""Every pass key is hidden once, at a depth of the schedule, and asked for; only answers are to be predicted."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lctrain.data.corpus import Corpus
from lctrain.data.multi_passkey import ORDINALS, WORDS, MultiPasskeyCorpus
from lctrain.data.table import TokenTable
from lctrain.data.tokenize import tokenize
from lctrain.errors import InputError

Build = Callable[..., MultiPasskeyCorpus]
HIDDEN = re.compile(r"\n\nKeep this in mind: the (\w+) passkey is ([a-z ]+)\.\n\n")
ASKED = re.compile(r"\nWhich words were the (\w+) passkey\? The \1 passkey is ([a-z ]+)\.\n")


@pytest.fixture
def build(corpus_of: Callable[..., Corpus]) -> Build:
    """From haystacks of about 1,000 digits and commas; keywords replace the settings."""
    haystack = corpus_of({f"hay{i}": "".join(f"{i}{j}," for j in range(250)) for i in range(5)})
    settings: dict[str, Any] = {
        "num_documents": 12, "num_passkeys": 3, "passkey_words": 5, "min_characters": 400, "max_characters": 2400,
        "num_lengths": 5, "min_depth": 0.1, "max_depth": 0.9, "num_depths": 9, "include_questions": False, "seed": 0,
    }  # fmt: skip
    return lambda **changes: MultiPasskeyCorpus(haystack=haystack, **{**settings, **changes})


def test_every_passkey_is_hidden_and_asked_for_in_turn(build: Build) -> None:
    for document in build().documents():
        hidden, asked = HIDDEN.findall(document.text), ASKED.findall(document.text)
        assert hidden == asked
        assert [ordinal for ordinal, _ in hidden] == list(ORDINALS[:3])
        assert all(len(passkey.split()) == 5 and set(passkey.split()) <= set(WORDS) for _, passkey in hidden)
        assert len({passkey for _, passkey in hidden}) == 3
        assert document.text.index(asked[0][0] + " passkey?") > document.text.rindex("Keep this in mind")


def test_lengths_and_depths_are_those_of_the_schedule(build: Build) -> None:
    seen = set()
    for i, document in enumerate(build().documents()):
        haystack = ASKED.sub("", HIDDEN.sub("", document.text))
        assert len(haystack) == [400, 900, 1400, 1900, 2400][i % 5]
        shifts = 0
        for match in HIDDEN.finditer(document.text):
            depth = (match.start() - shifts) / len(haystack)
            shifts += len(match[0])
            seen.add(round(depth, 6))
    assert seen <= set(np.linspace(0.1, 0.9, 9).round(6))
    assert len(seen) > 5


def test_nothing_but_the_seed_decides(build: Build) -> None:
    documents = list(build().documents())
    assert documents == list(build().documents())
    assert documents[:4] == list(build(num_documents=4).documents())
    assert documents != list(build(seed=1).documents())
    assert len({document.text for document in documents}) == 12
    assert {document.source for document in documents} == {f"hay{i}" for i in range(5)}


@pytest.mark.parametrize("include_questions", [False, True])
def test_only_answers_are_to_be_predicted(
    build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Any, include_questions: bool
) -> None:
    corpus = build(include_questions=include_questions)
    table: TokenTable = tokenize(corpus, tokenizer, tmp_path)
    for i, document in enumerate(corpus.documents()):
        tokens, mask = table.tokens(i), table.loss_mask(i)
        assert mask is not None
        assert len(mask) == len(tokens)
        assert not mask[0]
        assert not mask[-1]  # BOS and EOS
        runs = np.split(np.arange(len(mask)), np.flatnonzero(np.diff(mask)) + 1)
        predicted = [str(tokenizer.decode(tokens[run])) for run in runs if mask[run[0]]]
        answers = [f" {passkey}" for _, passkey in ASKED.findall(document.text)]
        if include_questions:
            asked = [f"\nWhich words were the {o} passkey? The {o} passkey is" for o in ORDINALS[:3]]
            answers = [question + answer for question, answer in zip(asked, answers, strict=True)]
        assert predicted == answers


def test_a_tokenizer_that_knows_no_characters_is_refused(
    build: Build, tokenizer: PreTrainedTokenizerFast, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(InputError, match="which characters a token stands for"):
        tokenize(build(), tokenizer, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_characters": 0}, {"min_characters": 2500}, {"num_passkeys": 0}, {"num_passkeys": 21}, {"num_depths": 2},
        {"min_depth": -0.1}, {"max_depth": 1.1}, {"min_depth": 0.95}, {"num_documents": 0}, {"passkey_words": 0},
        {"num_lengths": 0},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(build: Build, changes: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        build(**changes)


def test_a_haystack_without_text_is_refused(corpus_of: Callable[..., Corpus], build: Build) -> None:
    empty = MultiPasskeyCorpus(**{**vars(build()), "haystack": corpus_of({"nothing": ""})})
    with pytest.raises(InputError, match="holds no text"):
        next(empty.documents())
