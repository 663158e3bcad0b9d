"""The built wheel is whole: same code, same conf, found from anywhere."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lctrain import config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with the wheel installed, which the interpreter searches before the checkout."""
    dist, site = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", dist, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = dist.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, built]
    subprocess.run(install, check=True, capture_output=True)
    return site


def run(site, tmp_path, *command):
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_wheel_finds_its_own_conf_and_assets(wheel, tmp_path):
    (root,) = run(wheel, tmp_path, "-c", "from lctrain import config; print(config.root())").splitlines()
    assert Path(root).is_relative_to(wheel)
    for name in ("conf", "slurm", "data/tiny-base"):
        installed, original = Path(root, name), config.root() / name
        files = {path.relative_to(original) for path in original.rglob("*") if path.is_file()}
        assert {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()} == files


def test_the_wheel_composes_as_the_checkout_does(wheel, tmp_path):
    command = ("-m", "launch", "train", "--cfg", "job", "experiment=demo", "run_dir=r")
    assert run(wheel, tmp_path, *command) == run(ROOT, tmp_path, *command)
    assert "experiment" in run(wheel, tmp_path, str(wheel / "bin" / "lctrain"), "train", "--help")


def test_constraints_pin_every_dependency_inside_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name]), line


def test_the_version_is_the_packages():
    assert version("lctrain") == __import__("lctrain").__version__
