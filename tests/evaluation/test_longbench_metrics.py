"""Every number here was computed by LongBench's published metrics.py, with rouge 1.0.1 and fuzzywuzzy 0.18.0."""

import pytest

from lctrain.evaluation.longbench.metrics import METRICS

CLASSES = ["Number of something", "Number", "Other", "Other number", "Person"]
PUBLISHED = {
    "qa_f1": [
        ("The red, fox!", "a red fox", 1.0),
        ("red red fox", "red fox fox", 2 / 3),
        ("an apple a day", "apple", 2 / 3),
        ("theory", "the theory of", 2 / 3),
        ("co-op", "coop", 1.0),
        ("fox", "hen", 0.0),
        ("", "", 0.0),
    ],
    "rouge_l": [
        ("The cat sat. A dog ran home", "a dog ran. the cat sat on it", 0.5333333283555556),
        ("one two three four five", "one three five two", 0.6666666617283951),
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 0.6153846106508877),
        ("a.b . c", "a b c.", 0.999999995),
        ("x y z. ", "z y x", 0.2857142808163266),
        ("the same words", "the same words", 0.999999995),
        ("", " a", 0.0),
        ("...", "a", 0.0),
    ],
    "classification": [
        ("Number of something", "Number of something", 1.0),
        ("Other number", "Other number", 1.0),
        ("Number Person", "Number", 0.5),
        ("Number of something Other", "Number of something", 0.5),
        ("Person", "Other", 0.0),
    ],
    "retrieval": [
        ("Paragraph 12", "Paragraph 12", 1.0),
        ("It is 12, not 3 or 1", "Paragraph 12", 1 / 3),
        ("Paragraph 120", "Paragraph 12", 0.0),
        ("none", "Paragraph 12", 0.0),
    ],
    "count": [("There are 7.", "7", 1.0), ("7 of 17", "7", 0.5), ("07", "7", 0.0), ("", "7", 0.0)],
    "code_similarity": [
        ("for i in range(3):", "for i in range(10):", 0.92),
        ("\n# a\n`b`\nx = 1 // 2\nreturn a + b", "return b + a", 0.83),
        ("import numpy as np\nx", "import numpy", 0.8),
        ("abcabcabc", "cba", 0.17),
        ("# only", "", 1.0),
        ("//", "x", 0.0),
    ],
}


def test_every_metric_has_published_numbers():
    assert set(PUBLISHED) == set(METRICS)


@pytest.mark.parametrize(
    ("metric", "reply", "reference", "score"), [(name, *case) for name, cases in PUBLISHED.items() for case in cases]
)
def test_scores_are_the_published_ones(metric, reply, reference, score):
    assert METRICS[metric](reply, reference, CLASSES) == score


def test_a_class_is_not_looked_at_after_one_that_is_deleted():
    assert METRICS["classification"]("a b ab", "ab", ["a", "b", "ab"]) == 0.5
