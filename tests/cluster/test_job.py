"""What is asked of Slurm: each field does something, and what can't be is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from lctrain import config
from lctrain.cluster.job import Job, parse_time
from lctrain.cluster.script import job_script
from lctrain.errors import InputError

TEMPLATES = sorted((config.root() / "slurm").glob("*.sbatch"))
SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def job(*overrides: str) -> Job:
    made: Job = instantiate(config.compose("submit", list(overrides)).slurm, _convert_="all")
    return made


def script(*overrides: str) -> str:
    return job_script(job(*overrides), Path("/runs/a run"), ["--config-dir=/runs/a run", "--config-name=job"])


FIELDS = {  # another value of each, and the line that must tell
    "slurm.script=preemptible": "set -- callbacks.checkpoint.every_num_minutes=3",
    "slurm.name=other": "#SBATCH --job-name=other",
    "slurm.nodes=2": "#SBATCH --nodes=2",
    "slurm.gpus_per_node=4": "#SBATCH --gpus-per-node=4",
    "slurm.gpus_per_node=0 slurm.tasks_per_node=3": "#SBATCH --ntasks-per-node=3",
    "slurm.cpus_per_task=2": "#SBATCH --cpus-per-task=2",
    "slurm.mem=10G": "#SBATCH --mem=10G",
    "slurm.time=1-12": "#SBATCH --time=1-12",
    "slurm.partition=gpu": "#SBATCH --partition=gpu",
    "slurm.account=me": "#SBATCH --account=me",
    "slurm.qos=high": "#SBATCH --qos=high",
    "slurm.constraint=h100": "#SBATCH --constraint=h100",
    "slurm.array=0-3": "#SBATCH --array=0-3",
    "slurm.dependency=afterok:12": "#SBATCH --dependency=afterok:12",
    "slurm.signal_seconds=33": "#SBATCH --signal=B:USR1@33",
    "slurm.max_restarts=5": "max_restarts=5",
    "slurm.setup=[module load cuda]": "module load cuda",
}


@pytest.mark.parametrize("overrides", FIELDS)
def test_every_field_is_in_the_script(overrides):
    words = [overrides] if "[" in overrides else overrides.split()
    assert FIELDS[overrides] not in script()
    assert FIELDS[overrides] in script(*words)


def test_every_field_is_tested():
    tested = {
        word.partition("=")[0].removeprefix("slurm.") for words in FIELDS for word in words.split() if "=" in word
    }
    assert {"_target_", "offline", *tested} == set(config.compose("submit").slurm)


def test_offline_or_not():
    assert "HF_HUB_OFFLINE=1" in script()
    assert "HF_HUB_OFFLINE" not in script("slurm.offline=false")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_what_is_written_is_the_template_with_this_jobs_lines(template):
    """Line for line, but for options, environment and arguments: and what is sourced stands in it."""
    written = script(f"slurm.script={template.stem}", "slurm.array=4").splitlines()
    own = ("#SBATCH", "#   sbatch", "export ", "source ")
    shared = [line for line in template.read_text().splitlines() if not line.startswith(own)]
    assert all(line in written for line in shared)
    sourced = next(line.split()[1] for line in template.read_text().splitlines() if line.startswith("source"))
    assert (config.root() / sourced).read_text().partition("\n")[2] in "\n".join(written) + "\n"
    asked = {line.partition("=")[0] for line in template.read_text().splitlines() if line.startswith("#SBATCH")}
    assert asked <= {line.partition("=")[0] for line in written}


@pytest.mark.parametrize("template", [path.stem for path in TEMPLATES])
def test_scripts_pass_shellcheck(template, tmp_path):
    written = tmp_path / "job.sbatch"
    written.write_text(script(f"slurm.script={template}", "slurm.array=4", "slurm.setup=[module load cuda]"))
    folder = config.root() / "slurm"
    subprocess.run([SHELLCHECK, written, folder / f"{template}.sbatch", *folder.glob("*.sh")], check=True)


def test_the_template_follows_the_number_of_nodes():
    assert (job().template, job("slurm.nodes=2").template) == ("train_single_node", "train_multi_node")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:01", 7201), ("1-2", 93600), ("1-2:3", 93780), ("1-2:3:4", 93784)],
)
def test_times_as_slurm_writes_them(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("slurm.time=soon", "slurm.time=soon is not a time"),
        ("slurm.nodes=0", "slurm.nodes=0 must be at least 1"),
        ("slurm.gpus_per_node=8 slurm.tasks_per_node=4", "every one of the 8 GPUs of a node gets one process"),
        ("slurm.time=1 slurm.signal_seconds=60", "slurm.signal_seconds=60 leaves nothing of slurm.time=1"),
        ("slurm.max_restarts=-1", "slurm.max_restarts at least 0"),
        ("slurm.script=evaluate_array", "slurm.array must name the lengths"),
    ],
)
def test_what_can_not_be_is_refused(overrides, line):
    with pytest.raises(InstantiationException) as caught:
        job(*overrides.split())
    assert line in str(config.explain(caught.value, "submit"))
    assert isinstance(config.explain(caught.value, "submit"), InputError)
