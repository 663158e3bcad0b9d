"""What the documents refer to exists."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FOLDERS = ("lctrain", "launch", "conf", "tests", "docs", "slurm", "data")
THEIRS = ("log_sparse", "key_norm")  # files that a guide lets its reader make


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(document):
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [document.parent / link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)
    paths = [ROOT / path for path in named if not any(name in path for name in THEIRS)]
    assert not [str(path) for path in links + paths if not path.exists()]


def test_the_order_of_imports_is_the_one_that_is_checked():
    told = re.search(r"^```layers\n(.*?)^```$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [re.split(r"\s{2,}", line)[0] for line in told[1].splitlines()]
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert lines == [re.sub(r"[()]|lctrain\.", "", layer) for layer in contract["layers"]]
