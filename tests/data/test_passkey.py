"""Recall documents: exact sizes, the evaluation's wording, and nothing but the seed decides."""

import re
from collections.abc import Callable

import pytest

from lctrain.data.corpus import Corpus
from lctrain.data.passkey import PASS_KEY, PasskeyCorpus
from lctrain.errors import InputError

Build = Callable[..., PasskeyCorpus]


@pytest.fixture
def build(corpus_of: Callable[..., Corpus]) -> Build:
    """Recall documents from three haystacks of about 1,000 characters; keywords replace the settings."""
    haystack = corpus_of({f"hay{i}": "".join(f"line {i} {j} of hay\n" for j in range(60)) for i in range(3)})
    settings = {"num_documents": 40, "min_characters": 100, "max_characters": 500, "max_needles": 3}
    return lambda **changes: PasskeyCorpus(haystack=haystack, **{**settings, **changes})


def test_every_question_is_answered_once_in_the_text(build: Build) -> None:
    documents = list(build().documents())
    assert len(documents) == 40
    for document in documents:
        asked = re.findall(r"\nWhat is the (.+)\? The \1 is (\d{5})\.", document.text)
        hidden = re.findall(r"\nThe (.+) is (\d{5})\. Remember it\. \2 is the \1\.\n", document.text)
        assert 1 <= len(asked) <= 3
        assert sorted(asked) == sorted(hidden)
    assert any(PASS_KEY in document.text for document in documents)
    assert len({document.text for document in documents}) == 40


def test_documents_are_variants_of_their_haystack_and_follow_the_seed(build: Build) -> None:
    documents = list(build().documents())
    assert {document.source for document in documents} == {"hay0", "hay1", "hay2"}
    assert documents == list(build().documents())
    assert documents != list(build(seed=1).documents())


def test_sizes_stay_in_range(build: Build) -> None:
    sizes = [len(re.sub(r"\n(The|What) .*", "", d.text)) for d in build(num_documents=200).documents()]
    assert min(sizes) > 60
    assert max(sizes) < 520
    assert max(sizes) > 2 * min(sizes)


@pytest.mark.parametrize(
    "changes",
    [{"min_characters": 0}, {"min_characters": 600}, {"max_needles": 0}, {"max_needles": 99}, {"num_documents": 0}],
)
def test_settings_that_cannot_work_are_refused(build: Build, changes: dict[str, int]) -> None:
    with pytest.raises(InputError):
        build(**changes)


def test_haystack_without_long_documents_is_refused(build: Build) -> None:
    with pytest.raises(InputError, match="min_characters=5000"):
        list(build(min_characters=5000, max_characters=9000).documents())
