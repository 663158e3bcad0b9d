"""Words that name RULER's needles: pairs of an adjective and a noun."""

from functools import lru_cache
from pathlib import Path

from lctrain.errors import InputError

FILES = ("adjectivelist.txt", "nounlist.txt")  # one word a line, as in the package wonderwords
OWN = Path(__file__).parent / "words"


@lru_cache(maxsize=1)
def word_pairs(folder: str | None) -> list[str]:
    """Return every adjective-noun pair of the lists in a folder, sorted; None means lctrain's own lists.

    Raises InputError if the folder lacks a list.
    """
    lists = []
    for file in FILES:
        path = (OWN if folder is None else Path(folder).expanduser()) / file
        if not path.is_file():
            raise InputError(f"{path}: no such file; words must be a folder with {' and '.join(FILES)}")
        lists.append([word.rstrip() for word in path.read_text(encoding="utf-8").splitlines()])
    adjectives, nouns = lists
    return sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
