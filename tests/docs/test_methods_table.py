"""The tables of choices are those that the command makes."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MADE = runpy.run_path(str(ROOT / "docs" / "make_tables.py"))
STALE = "run .venv/bin/python docs/make_tables.py"


def test_the_table_of_methods_is_the_one_that_is_made():
    assert MADE["METHODS"].read_text() == MADE["methods"](), STALE


def test_the_readmes_table_is_the_one_that_is_made():
    text = MADE["README"].read_text()
    assert text == MADE["readme"](text), STALE


def test_every_choice_is_in_the_readme_and_notes_are_kept():
    begin, end = MADE["BEGIN"], MADE["END"]
    made = MADE["readme"](f"{begin}\n| `cache` (evaluate) | gone (old), full (a note) |\n{end}")
    assert "| `cache` (evaluate) | full (a note), duo, " in made
    assert "gone" not in made
    assert all(f"| `{group}`" in made for group in MADE["IN_README"])


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("YaRN (Peng et al., arXiv:2309.00071, eq. 17-23).\n\nMore.", "YaRN."),
        ("Llama 3.1's scaling (arXiv:2407.21783, and code). `a` is next.", "Llama 3.1's scaling."),
        ("Each `x` sees\nitself. Xiao et al., arXiv:2309.17453.", "Each `x` sees itself."),
    ],
)
def test_a_row_says_the_first_sentence_without_its_paper(docstring, sentence):
    assert MADE["cited"](MADE["sentence"](docstring)) == sentence
