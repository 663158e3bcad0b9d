import hashlib
import re
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from lctrain.errors import InputError
from lctrain.evaluation.ruler.base import largest_size, string_match_all
from lctrain.evaluation.ruler.niah import DEPTHS, NOISE, Niah, among, in_text
from lctrain.evaluation.ruler.words import word_pairs

WORDS = str(Path(__file__).parent / "files")
SMALL = {"num_samples": 2, "max_new_tokens": 6}
CASES = {
    "niah_multikey_2": ("ruler_niah_multikey_2", {"lengths": [900, 1300], **SMALL}),
    "niah_multikey_3": ("ruler_niah_multikey_3", {"lengths": [1300, 1500], **SMALL}),
    "niah_single_1": ("ruler_niah_single_1", {"lengths": [1100, 1300], **SMALL}),
    "niah_multivalue": ("ruler_niah_multivalue", {"lengths": [3700, 4200], **SMALL}),
    "niah_multiquery": ("ruler_niah_multiquery", {"lengths": [3800, 4200], **SMALL}),
}
FIELDS = {
    "num_samples": 3, "max_new_tokens": 5, "chat_template": "default", "seed": 1, "type_haystack": "noise",
    "type_needle_k": "numbers", "type_needle_v": "words", "num_needle_k": 2, "num_needle_v": 2, "num_needle_q": 2,
    "words": WORDS,
}  # fmt: skip
REFUSED = [
    ({"lengths": [600, 1300]}, "niah: the smallest haystack .* need a length of about [67]\\d\\d, got 600"),
    ({"words": "/nowhere"}, "/nowhere/adjectivelist.txt: no such file"),
    ({"chat_template": "tools"}, "chat_template=tools: the tokenizer has default"),
]
TASK = Niah(
    lengths=[1300], sequence_length=1300, batch_tokens=None, **SMALL, chat_template=None, seed=42,
    type_haystack="needle", type_needle_k="words", type_needle_v="numbers", num_needle_k=1, num_needle_v=1,
    num_needle_q=1, words=WORDS,
)  # fmt: skip


def asked(example, tokenizer):
    return tokenizer.decode(example.prompt[1:])


def samples(task, tokenizer, documents=(), num_samples=4):
    return task.samples(tokenizer, task.prepare(tokenizer, documents), task.lengths[0], num_samples=num_samples)


def test_a_haystack_of_needles_holds_nothing_else(tokenizer):
    for example in samples(TASK, tokenizer):
        first, *lines, question = asked(example, tokenizer).split("\n")
        assert first.startswith("A special magic number is hidden within")
        needle = r"One of the special magic numbers for ((?:calm|red)-\w+) is: (\d{7})\."
        facts = [re.fullmatch(needle, line) for line in lines]
        key = re.search(r"What is the special magic number for (.*) mentioned .* for (.*) mentioned", question)
        assert key[1] == key[2]
        assert (key[1], example.references[0]) in [(fact[1], fact[2]) for fact in facts]


def test_answers_are_drawn_anew_in_every_sample_and_by_every_seed(tokenizer):
    first, second = samples(TASK, tokenizer), samples(replace(TASK, seed=43), tokenizer)
    assert len({example.references[0] for example in first + second}) == 8


def test_uuids(tokenizer):
    task = replace(TASK, lengths=[1500], type_needle_k="uuids", type_needle_v="uuids", words=None)
    (answer,) = samples(task, tokenizer)[0].references
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", answer)


def test_several_are_asked_for_at_once(tokenizer):
    task = replace(TASK, lengths=[2000], num_needle_q=3, num_needle_k=2, words=None)
    for example in samples(task, tokenizer):
        text = asked(example, tokenizer)
        question = r"What are all the special magic numbers for (\S+), (\S+), and (\S+) mentioned"
        keys = re.match(question, text.splitlines()[-1]).groups()
        needles = dict(re.findall(r"numbers for (\S+) is: (\d+)", text))
        assert example.references == [needles[key] for key in keys]


# What NVIDIA's scripts/data/synthetic/niah.py made of these settings (c3f5e3b, with these words in wonderwords' place).
PUBLISHED = {
    "niah_single_1": "895d76af437f674a",
    "niah_multikey_2": "f13e19778a85d789",
    "niah_multikey_3": "81830dcaa2d1a228",
}


def digest(texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_and_answers_are_those_of_the_published_generator(task_of, tokenizer, name):
    words = {} if name == "niah_multikey_3" else {"words": WORDS}
    told = []
    for length in (2048, 4500):
        task = task_of(name, lengths=[length], max_new_tokens=128, **words)
        for example in samples(task, tokenizer, num_samples=5):
            told += [asked(example, tokenizer), *example.references]
    assert digest(told) == PUBLISHED[name]


def test_an_essay_is_the_corpus_with_needles_between_sentences(task_of, data, tokenizer):
    task = task_of("niah_multivalue")
    words = " ".join(tokenizer.decode(document, skip_special_tokens=True) for document in data.documents()).split()
    for example in samples(task, tokenizer, data.documents()):
        text = asked(example, tokenizer)
        context = text.partition("\n")[2].rpartition("\nWhat are all")[0]
        rest = re.sub(r"One of the special magic numbers for \S+ is: \d+\.", "", context).split()
        assert rest == words[: len(rest)]
        for before in re.findall(r"(\S+) +One of", context):
            assert before[-1] in ".!?"
        assert len(re.findall(r"One of the", context)) == 4


def test_an_essay_goes_on_from_the_beginning(task_of, tokenizer):
    short = [np.array(tokenizer.encode("a b. c"))]
    text = asked(samples(task_of("niah_multivalue", lengths=[2500]), tokenizer, short)[0], tokenizer)
    assert "a b. c a b. c a b." in text
    with pytest.raises(InputError, match="the corpus has none"):
        task_of("niah_multivalue").prepare(tokenizer, [])


def test_needles_lie_at_the_depths_that_are_drawn():
    sentences = [f"s{i}." for i in range(200)]
    text = in_text(Random(3), ["A", "B"], " ".join(sentences)).split()
    first, second = sorted(Random(3).sample(np.round(np.linspace(0, 100, 40)).astype(int).tolist(), 2))
    assert (text.index("A"), text.index("B")) == (2 * first, 2 * second + 1)
    assert len(DEPTHS) == 40


def test_needles_among_lines():
    lines = among(Random(0), ["A", "B"], [NOISE] * 9).split("\n")
    assert sorted(lines) == ["A", "B", *[NOISE] * 9]
    assert lines.index("B") < lines.index("A")


@pytest.mark.parametrize("per_unit", [1, 7, 30])
@pytest.mark.parametrize("length", [100, 999, 4000])
def test_the_haystack_is_the_largest_that_fits(per_unit, length):
    size = largest_size(lambda size: 20 + per_unit * size, length, length - 10, step=2)
    largest = max(2, (length - 10 - 20) // per_unit)
    assert size == min(largest, max(int(length / ((20 + 2 * per_unit) / 2) * 3), 4))


@pytest.mark.parametrize(
    ("reply", "score"), [("12 and 34", 1.0), ("it is 34", 0.5), ("1\x002", 0.0), ("", 0.0), ("A-B 12", 0.5)]
)
def test_string_match_all(reply, score):
    assert string_match_all(reply, ["12", "34"]) == score
    assert string_match_all("It is A-b", ["a-B"]) == 1


def test_word_pairs(tmp_path):
    assert word_pairs(WORDS) == ["calm-fox", "calm-hill", "calm-oak", "red-fox", "red-hill", "red-oak"]
    pairs = word_pairs(None)
    assert len(pairs) > 10**6
    assert all(re.fullmatch(r"[a-z]+-[a-z]+", pair) for pair in pairs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 0}, "num_samples and max_new_tokens must be positive"),
        ({"max_new_tokens": 0}, "must be positive"),
        ({"num_needle_v": 0}, "must be positive"),
        ({"num_needle_v": 6}, "hides 6 needles, which must be at most 5"),
        ({"num_needle_q": 41, "type_haystack": "essay"}, "hides 41 needles, which must be at most 40"),
        ({"type_needle_k": "uuids"}, "neither keys nor values are words"),
    ],
)
def test_refuses_settings(fields, message):
    with pytest.raises(InputError, match=message):
        replace(TASK, **fields)
