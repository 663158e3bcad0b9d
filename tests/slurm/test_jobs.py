"""Jobs as people start them: by the command line, by sbatch, as arrays and sweeps."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lctrain import config
from lctrain.cluster.slurm import job_states
from lctrain.folder import read_history
from tests.slurm.cluster import wait_for
from tests.slurm.conftest import RUN

pytestmark = pytest.mark.slurm

SHORT = [word for word in RUN if not word.startswith(("slurm.", "trainer.max_steps"))] + ["trainer.max_steps=3"]
ONE = ["slurm.gpus_per_node=0", "slurm.tasks_per_node=1", "slurm.cpus_per_task=1", "slurm.time=10"]
UNFINISHED = {"PENDING", "RUNNING", "COMPLETING"}


@pytest.fixture
def lctrain(cluster, tmp_path) -> Callable[..., str]:
    """Runs a command in an empty folder; what it prints."""

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "launch", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def ends_well(job_id: str, count: int = 1) -> None:
    """Wait until so many jobs of this id are over, all of them well."""

    def states() -> list[str]:
        return [job.state for job in job_states([job_id]).values()]

    wait_for(lambda: len(states()) >= count and not UNFINISHED & set(states()), 180, every=0.5)
    assert set(states()) == {"COMPLETED"}


def test_an_array_of_seeds_and_an_evaluation_that_waits_for_it(lctrain, cluster, tmp_path):
    told = lctrain("submit", *SHORT, *ONE, "slurm.array=[1,2]", "run_dir=runs/seeds")
    array = next(line.split()[1] for line in told.splitlines() if line.startswith("job"))
    assert f"log     {tmp_path}/runs/seeds/slurm-{array}_" in told
    words = ["sequence_length=512", "evaluation=perplexity", "evaluation.perplexity.lengths=[256]", "slurm.array=[1]"]
    sizes = ["evaluation.perplexity.num_tokens=512", f"slurm.dependency=afterok:{array}"]
    model = f"model.path={config.asset('tiny-base')}"
    told = lctrain("submit", "evaluate", *words, *sizes, *ONE, model, "run_dir=eval")
    evaluation = next(line.split()[1] for line in told.splitlines() if line.startswith("job"))
    ends_well(array, 2)
    ends_well(evaluation)
    accounts = cluster.run("sacct", "-nXP", f"--jobs={array},{evaluation}", "--format=JobID,Start,End").splitlines()
    times = {job_id: (start, end) for job_id, start, end in (line.split("|") for line in accounts)}
    assert times[f"{evaluation}_1"][0] >= max(times[f"{array}_1"][1], times[f"{array}_2"][1])
    losses = [read_history(tmp_path / f"runs/seeds/{seed}/metrics.jsonl")[-1]["loss"] for seed in (1, 2)]
    assert losses[0] != losses[1]
    assert (tmp_path / "eval/1/report.json").is_file()
    table = lctrain("status")
    assert f"{array}_1" in table
    assert table.count("3/3") == 2


def test_a_submitted_run_is_cancelled_by_its_folder(lctrain, tmp_path):
    told = lctrain("submit", *SHORT, *ONE, "trainer.max_steps=100000", "run_dir=runs/a")
    job_id = (tmp_path / "runs/a/job_id.txt").read_text().strip()
    assert f"job     {job_id}\n" in told
    assert "cancelled" in lctrain("cancel", "runs/a")
    wait_for(lambda: job_states([job_id])[job_id].state == "CANCELLED", 30)


@pytest.mark.parametrize("script", ["train_single_node", "train_multi_node", "preemptible", "evaluate_array"])
def test_scripts_run_by_hand(script, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    # train_single_node fits these nodes as it is; the others ask for more GPUs than there are.
    smaller = [] if script == "train_single_node" else ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    options = [*smaller, "--time=10", f"--output={tmp_path}/log-%a"]
    if script == "evaluate_array":
        options += ["--array=1"]
        words = ["evaluation=perplexity", "evaluation.perplexity.lengths=[256]", "evaluation.perplexity.num_tokens=512"]
    else:
        words = SHORT
    command = ["sbatch", "--parsable", *options, f"slurm/{script}.sbatch", f"run_dir={tmp_path}/run", *words]
    done = subprocess.run(command, cwd=config.root(), capture_output=True, text=True, check=True)
    ends_well(done.stdout.strip())
    if script == "evaluate_array":
        assert (tmp_path / "run/report.json").is_file()
    else:
        assert read_history(tmp_path / "run/metrics.jsonl")[-1]["step"] == 3


@pytest.mark.parametrize("launcher", ["slurm", "submitit_local"])
def test_a_sweep_is_a_job_for_each_value(launcher, lctrain, tmp_path):
    words = ["hydra.launcher.gpus_per_node=0", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"]
    folder = "run_dir=runs/sweep/${hydra:job.num}"
    rest = [word for word in SHORT if not word.startswith("optimizer.lr")]
    lctrain("train", "--multirun", "optimizer.lr=1e-4,2e-4", f"hydra/launcher={launcher}", *words, folder, *rest)
    rows = [read_history(tmp_path / f"runs/sweep/{number}/metrics.jsonl") for number in (0, 1)]
    assert [row[-1]["step"] for row in rows] == [3, 3]
    assert rows[0][-1]["loss"] != rows[1][-1]["loss"]
