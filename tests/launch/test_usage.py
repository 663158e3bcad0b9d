"""Help is quick, complete and true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.usage import VERBS, overview, usage
from lctrain import config


def test_overview_names_every_verb():
    assert all(f"\n  {verb} " in overview() for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_usage_lists_every_group_choice_and_option(verb):
    text = usage(verb)
    for group, (default, choices) in config.groups(verb).items():
        assert group in text
        assert default is None or f"{default}*" in text
        assert all(choice in text for choice in choices)
    options = set(OmegaConf.load(config.conf_dir() / f"{verb}.yaml")) - {"defaults", "hydra"}
    assert options
    assert all(f"\n  {option}:" in text for option in options)
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("verb", VERBS)
def test_groups_are_those_that_compose(verb):
    assert all(
        config.compose(verb).get(group.rpartition("@")[2]) is not None
        for group in config.groups(verb)
        if group != "experiment"
    )


def test_the_readme_names_every_choice():
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    rows = dict(reversed(re.findall(r"^\| `(\w+)`[^|]*\| (.*) \|$", readme, re.MULTILINE)))  # of two, the first
    groups = config.groups("train") | config.groups("evaluate")
    assert len(rows) > 9
    for group, told in rows.items():
        names = re.sub(r" \([^)]*\)", "", told).split(", ")
        assert sorted(names) == groups[group][1], group


def test_examples_compose(subtests):
    for verb in VERBS:
        for line in usage(verb).splitlines():
            if line.startswith(f"  lctrain {verb} ") and "…" not in line:
                words = re.sub(r"<[^>]*>", "somewhere", line).split()[2:]
                with subtests.test(line):
                    config.compose(verb, [word for word in words if "=" in word])


def loaded(arguments, folder, *packages):
    """Which of the packages the command imports."""
    code = (
        "import sys; from launch.main import main; main();"
        f"print(sorted({set(packages)} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["plan", "-h"]])
def test_help_imports_nothing_heavy(arguments, tmp_path):
    assert loaded(arguments, tmp_path, "torch", "hydra", "lightning", "transformers") == "[]\n"


def test_looking_at_runs_loads_no_model(tmp_path):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/config.yaml").write_text("trainer: {max_steps: 3}\n")
    assert loaded(["status"], tmp_path, "torch", "lightning", "transformers") == "[]\n"
