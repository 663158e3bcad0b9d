"""What submitting leaves behind: a snapshot that computes what was asked for, or nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lctrain import config
from lctrain.cluster.cancel import main as cancel
from lctrain.cluster.submit import main as submit
from lctrain.errors import InputError


def test_the_snapshot_composes_to_the_run_that_was_asked_for(submission, slurm, tmp_path, capsys, monkeypatch):
    cfg = submission("optimizer.lr=3e-3", "attention=sliding_window", "attention.sliding_window=8", "slurm.nodes=2")
    submit(cfg)
    run = tmp_path / "run"
    told = capsys.readouterr().out
    for line in ("job     77", f"folder  {run}", f"log     {run}/slurm-77.log", "W&B     not used"):
        assert line in told
    assert (run / "job_id.txt").read_text() == "77\n"
    code = run / "code"
    command = [sys.executable, "-m", "launch", "train", f"--config-dir={run}", "--config-name=job", "--cfg", "job"]
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(
        [*command, "--resolve"], cwd=code, env=environment, capture_output=True, text=True, check=True
    )
    composed = OmegaConf.create(done.stdout)
    assert (composed.optimizer.lr, composed.trainer.num_nodes, composed.resume) == (0.003, 2, "auto")
    assert composed == OmegaConf.load(run / "config.yaml")
    assert set(composed) <= set(config.compose("train", []))  # so that the same run can go on by hand
    where = subprocess.run(
        [sys.executable, "-c", "import lctrain; print(lctrain.__file__)"],
        cwd=code, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()) == code / "lctrain/__init__.py"


def test_dry_run_prints_the_script_and_does_nothing(submission, slurm, tmp_path, capsys):
    submit(submission("dry_run=true", "model.path=/not/there"))
    assert capsys.readouterr().out.startswith("#!/usr/bin/env bash\n# Train on one node")
    assert not (tmp_path / "run").exists()
    assert slurm.read_text() == ""


REFUSED = {
    "model.path=/not/there": "model.path=/not/there does not exist",
    "data.path=/not/there": "no such file or folder; set data.path",
    "device_memory=0.0001": "does not fit",
    "rows_per_step=64": "set trainer.accumulate_grad_batches=64",
    "rows_per_step=65 datamodule.micro_batch_size=2": "no trainer.accumulate_grad_batches makes it",
    "trainer.devices=3": "trainer.devices=3 but the job has 1",
    "trainer.accelerator=auto": "slurm.gpus_per_node=0 with trainer.accelerator=auto",
    "slurm.nodes=5": "slurm.nodes=5 is more than partition main allows: 4",
    "slurm.time=3-0": "slurm.time=3-0 is more than partition main allows: 2-00:00:00",
    "slurm.cpus_per_task=17": "1 nodes with 17 CPUS each; partition main has 4, the largest with 16",
    "slurm.gpus_per_node=9 slurm.tasks_per_node=9": "1 nodes with 9 GPUS each",
    "sequence_parallel_size=2": "sequence_parallel_size=2 does not divide",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_would_fail_in_the_queue_is_refused_before_anything_is_written(overrides, submission, slurm, tmp_path):
    with pytest.raises(Exception) as caught:  # noqa: PT011  what it says is compared
        submit(submission(*overrides.split()))
    assert REFUSED[overrides] in str(config.explain(caught.value, "submit"))
    assert not (tmp_path / "run").exists()
    assert "--parsable" not in slurm.read_text()


def test_a_disk_that_is_too_small(submission, slurm, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.statvfs_result((0,) * 10) and type("", (), {"free": 1000}))
    with pytest.raises(InputError, match="the checkpoints need"):
        submit(submission())
    assert not (tmp_path / "run").exists()


def test_what_only_the_cluster_can_judge(submission, slurm, commands, tmp_path):
    commands(sbatch='echo "sbatch: error: invalid account" >&2; exit 1')
    with pytest.raises(InputError, match="invalid account"):
        submit(submission())
    assert not (tmp_path / "run").exists()


def test_a_partition_that_is_down(submission, slurm, commands):
    commands(scontrol="echo 'PartitionName=main Default=YES MaxNodes=4 MaxTime=UNLIMITED State=DOWN'")
    with pytest.raises(InputError, match=r"slurm\.partition=main is DOWN"):
        submit(submission())


def test_a_folder_is_not_queued_twice(submission, slurm, commands, tmp_path):
    submit(submission())
    with pytest.raises(InputError, match="already holds a run"):
        submit(submission())
    commands(squeue="echo '77|PENDING|Resources'")
    with pytest.raises(InputError, match=r"job 77 of .* is PENDING"):
        submit(submission("resume=auto"))
    commands(squeue="")
    submit(submission("resume=auto"))


def test_a_job_is_cancelled_by_its_folder(submission, slurm, commands, tmp_path):
    folder = OmegaConf.create({"run_dir": str(tmp_path / "run")})
    with pytest.raises(InputError, match="was not submitted"):
        cancel(folder)
    submit(submission())
    cancel(folder)
    assert "scancel 77\n" in slurm.read_text()
    commands(sacct="echo '77|COMPLETED'")
    with pytest.raises(InputError, match="has ended: COMPLETED"):
        cancel(folder)


def test_an_evaluation_is_an_array_over_lengths(slurm, saved, text, tmp_path):
    words = [f"run_dir={tmp_path}/run", f"model.path={saved('llama')}", "data=text", f"data.path={text}"]
    sizes = ["sequence_length=64", "evaluation=perplexity", "slurm.gpus_per_node=0", "slurm.tasks_per_node=1"]
    small = [f"datamodule.cache_dir={tmp_path}/tokens", "datamodule.heldout_fraction=0.5"]
    lengths = ["evaluation.perplexity.lengths=[64]", "evaluation.perplexity.num_tokens=64"]
    cfg = config.compose("submit_evaluate", [*words, *sizes, *small, *lengths])
    submit(cfg)
    script = (tmp_path / "run/job.sbatch").read_text()
    assert "#SBATCH --array=4,8,16,32" in script
    assert "python -m launch evaluate resume=auto" in script
