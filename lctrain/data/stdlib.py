"""Read the running interpreter's standard library, a text that every machine has."""

import logging
import os
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lctrain.data.corpus import Corpus, Document

logger = logging.getLogger(__name__)

INSTALLED = {"site-packages", "dist-packages", "__pycache__"}
TESTS = {"test", "tests", "idle_test"}


@dataclass(frozen=True, kw_only=True)
class StdlibCorpus(Corpus):
    """A corpus of every .py file of the standard library, named by its path there.

    The test packages hold files that are invalid on purpose; such files are skipped and counted.
    """

    include_tests: bool = False

    def files(self) -> Sequence[Path]:
        excluded = INSTALLED if self.include_tests else INSTALLED | TESTS
        found = []
        for folder, subfolders, names in os.walk(self._root):
            subfolders[:] = [name for name in subfolders if name not in excluded]  # installed packages can be huge
            found += [Path(folder, name) for name in names if name.endswith(".py")]
        return sorted(found)

    def size_hint(self) -> int:
        return len(self.files())

    def documents(self) -> Iterator[Document]:
        skipped = 0
        for file in self.files():
            try:
                with tokenize.open(file) as stream:  # honours the encoding that the file declares
                    text = stream.read()
            except (SyntaxError, UnicodeDecodeError):
                skipped += 1
                continue
            yield Document(name=file.relative_to(self._root).as_posix(), text=text)
        if skipped:
            logger.info("skipped %d standard library files that do not decode", skipped)

    @property
    def _root(self) -> Path:
        return Path(sysconfig.get_path("stdlib"))
