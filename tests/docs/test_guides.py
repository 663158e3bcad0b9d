"""Every guide works: its files are written, its commands run in order, and they print what the guide says.

A `python` or `yaml` block whose first line is a comment with a path is that file; any other `python` block runs. The
commands of a `bash` block run; those of a `bash planned` block train a large model, and are only planned or composed.
A `text` block is what the block before it prints, in this order, with … for anything.
"""

import contextlib
import io
import logging
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from launch.main import main
from lctrain.config import compose

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
BLOCK = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# ([\w./]+\.(?:py|yaml))\n")


@pytest.fixture
def reader(tmp_path, tmp_path_factory, monkeypatch):
    """A reader of a guide, who sits in an empty folder and has the tokenized corpora of earlier guides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    root, known = logging.getLogger(), set(sys.modules)
    handlers, level = root.handlers[:], root.level
    yield Reader(monkeypatch)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in sys.modules.keys() - known:
        if name.partition(".")[0] in ("methods", "policies"):
            del sys.modules[name]


class Reader:
    """Does what the blocks of one guide say; the names of its `python` blocks are those of one session."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.names = monkeypatch, {}

    def do(self, language, how, text):
        """What a block prints."""
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            if named := NAMED.match(text):
                path = Path(named[1])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            elif language == "python":
                exec(text, self.names)
            else:
                for command in re.sub(r"\\\n", "", text).splitlines():
                    self.run(shlex.split(command), planned=how == "planned")
        return out.getvalue()

    def run(self, words, planned):
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            self.monkeypatch.setenv(name, value.replace("$PWD", str(Path.cwd())))
        elif words[0] == "python":
            done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, check=True)
            print(done.stdout)
        elif planned and words[1] != "train":
            compose(words[1], words[2:])
        else:
            self.lctrain(*(["plan", *words[2:]] if planned else words[1:]))

    def lctrain(self, *words):
        self.monkeypatch.setattr(sys, "argv", ["lctrain", *words])
        try:
            main()
        except SystemExit as end:
            if end.code != 2:  # else it has printed a line that begins with "error: "
                raise


@pytest.mark.parametrize("guide", sorted(GUIDES.glob("*.md")), ids=lambda path: path.stem)
def test_a_guide_works(guide, reader):
    blocks = BLOCK.findall(guide.read_text())
    assert {language for language, *_ in blocks} <= {"python", "yaml", "bash", "text"}
    for (language, how, text), (following, _, told) in pairwise([*blocks, ("", "", "")]):
        if language != "text":
            printed, expected = reader.do(language, how, text), told if following == "text" else ""
            assert ("error: " in printed) == ("error: " in expected), printed
            parts = re.split(r"(…|\n)", expected.strip())
            pattern = "".join({"…": ".*?", "\n": ".*?\n.*?"}.get(part, re.escape(part)) for part in parts)
            assert re.search(pattern, printed, re.DOTALL), f"{expected}\nis not what was printed:\n{printed}"
