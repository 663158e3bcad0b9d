"""What a job does when its step has ended, with commands of Slurm that only note what they were asked."""

import os
import subprocess

import pytest

from lctrain import config


@pytest.fixture
def job(commands, tmp_path):
    """Runs slurm/train.sh where srun ends with `code` in a job that is RUNNING, or not, after so many failures."""

    def run(code: int, *, state: str = "RUNNING", failures: str = "(null)", srun: str = "", **environment: str):
        called = commands(srun=f"{srun}\nexit {code}", squeue=f"echo '{state} {failures}'", scontrol="")
        given = {"SLURM_JOB_ID": "12", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "max_restarts": "2"}
        script = ["bash", config.root() / "slurm/train.sh", "seed=3"]
        done = subprocess.run(script, cwd=tmp_path, env=os.environ | given | environment, check=False)
        return done.returncode, called.read_text()

    return run


@pytest.mark.parametrize("code", [0, 2])
def test_done_and_wrong_input_do_not_come_back(job, code):
    returned, called = job(code)
    assert returned == code
    assert "requeue" not in called


def test_stopped_on_request_always_comes_back_and_failures_are_forgotten(job):
    _, called = job(75, failures="2")
    assert "scontrol update JobId=12 Comment=0\nscontrol requeue 12" in called


@pytest.mark.parametrize(("before", "after"), [("(null)", "1"), ("1", "2")])
def test_a_failure_is_counted_and_tried_again(job, before, after):
    _, called = job(137, failures=before)
    assert f"scontrol update JobId=12 Comment={after}\nscontrol requeue 12" in called


def test_too_many_failures_end_it(job):
    returned, called = job(1, failures="2")
    assert returned == 1
    assert "requeue" not in called


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING"])
def test_a_job_that_is_not_running_any_more_is_left_alone(job, state):
    assert "requeue" not in job(75, state=state)[1]


def test_the_run_gets_its_folder_size_and_overrides(job):
    assert (
        "srun --kill-on-bad-exit=1 python -m launch train resume=auto run_dir=runs/job-12 trainer.num_nodes=2 "
        "trainer.devices=8 seed=3\n"
    ) in job(0)[1]


def test_a_task_of_an_array_has_a_seed_and_a_folder_of_its_own(job):
    called = job(0, SLURM_ARRAY_JOB_ID="11", SLURM_ARRAY_TASK_ID="5")[1]
    assert "run_dir=runs/job-11/5 " in called
    assert "seed=5 seed=3" in called  # what is given by hand is the last word


def test_a_signal_is_passed_on_and_the_step_waited_for(job):
    slow = "trap 'exit 75' USR1; sleep 1; kill -TERM $PPID; for i in {1..100}; do sleep 0.1; done"
    returned, called = job(1, srun=slow)
    assert returned == 75
    assert "scontrol requeue 12" in called
