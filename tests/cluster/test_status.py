"""What is said of a run, with Slurm and without."""

import fcntl
import json

import pytest
from omegaconf import OmegaConf

from lctrain.cluster.status import main
from lctrain.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """A folder `runs` with a run of 100 steps that has taken `steps` of 1 s, submitted as job 77."""

    def make(name: str, steps: int, job: str | None = "77"):
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        OmegaConf.save({"trainer": {"max_steps": 100}}, path / "config.yaml")
        rows = [
            {"step": n, "loss": 2.5, "tokens": 64 * n, "tokens_per_second": 64.0, "restarts": n // 10}
            for n in range(1, steps + 1)
        ]
        (path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        if job:
            (path / "job_id.txt").write_text(f"{job}\n")
        return path

    return make


@pytest.fixture
def status(capsys, tmp_path, monkeypatch):
    """Prints the table; its rows, name → cells."""

    def show(run_dir=None):
        monkeypatch.setenv("COLUMNS", "300")
        main(OmegaConf.create({"run_dir": run_dir and str(run_dir), "folder": str(tmp_path / "runs")}))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
        return {row[0].rpartition("/")[2]: row[1:] for row in cells}

    return show


def test_a_running_job(folder, status, commands):
    commands(sbatch="", squeue="echo '77|RUNNING|None'", sacct="")
    folder("a", 40)
    assert status() == {"a": ["77", "running", "40/100", "2.500", "64", "0:01:00", "4"]}


def test_an_evaluation_beside_runs(folder, status, commands):
    commands(sbatch="", squeue="echo '77|RUNNING|None'", sacct="")
    for name, job in (("a", "77"), ("b", None), ("c", None)):
        OmegaConf.save({"sequence_length": 512}, folder(name, 0, job) / "config.yaml")
    (folder("d", 100, None).parent / "c" / "report.json").write_text("{}")
    assert {name: row[1:3] for name, row in status().items()} == {
        "a": ["running", "evaluation"],
        "b": ["stopped", "evaluation"],
        "c": ["done", "evaluation"],
        "d": ["done", "100/100"],
    }


def test_a_waiting_job_says_why_and_an_ended_one_how(folder, status, commands):
    commands(sbatch="", squeue="echo '77|PENDING|Resources'", sacct="echo '78|NODE_FAIL'")
    folder("a", 0)
    folder("b", 9, "78")
    assert status()["a"] == ["77", "pending (Resources)", "0/100", "", "", "", ""]
    assert status()["b"][1] == "node_fail"


def test_without_slurm_the_folder_tells(folder, status, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    stopped, _, held = folder("stopped", 40), folder("done", 100, None), folder("held", 7, None)
    with (held / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shown = status()
        assert {name: row[1] for name, row in shown.items()} == {
            "stopped": "stopped",
            "done": "done",
            "held": "running",
        }
    assert status(stopped) == {"stopped": ["77", "stopped", "40/100", "2.500", "64", "", "4"]}


def test_the_tasks_of_an_array_stand_for_themselves(folder, status, commands):
    commands(sbatch="", squeue="echo '77_3|RUNNING|None'; echo '77_4|PENDING|Priority'", sacct="")
    above = folder("seeds", 0)
    (above / "job_id.txt").write_text("77\n")
    for seed in ("3", "4"):
        folder(f"seeds/{seed}", 10, None)
    assert {name: row[:2] for name, row in status().items()} == {
        "3": ["77_3", "running"], "4": ["77_4", "pending (Priority)"],
    }  # fmt: skip


def test_what_is_no_run(status, tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        status(tmp_path)
    with pytest.raises(InputError, match="holds no runs"):
        status()
