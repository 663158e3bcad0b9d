"""What a cluster does to a job, on a real Slurm of two nodes: the run comes out the same to the bit."""

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lctrain.folder import whole_checkpoints
from tests.slurm.cluster import wait_for
from tests.slurm.conftest import EVERY, NUM_STEPS, Run
from tests.test_tracking import items, records

pytestmark = pytest.mark.slurm


def assert_same(run: Run, undisturbed: Run) -> None:
    """The losses of every step, each once, and the final weights."""
    assert run.losses() == undisturbed.losses()
    assert run.weights() == undisturbed.weights()


def assert_one_wandb_run(run: Run) -> None:
    """Offline, in a file for each life of the job: the same id, one axis of steps, the restarts logged.

    The second file begins with the steps of the first, which W&B's process may not have written before SIGTERM came.
    """
    files = sorted(run.folder.glob("wandb/offline-run-*/*.wandb"))
    read = [record for file in files for record in records(file)]
    assert len(files) == 2
    assert len({record.run.run_id for record in read if record.HasField("run")}) == 1
    history = [record.history for record in read if record.HasField("history")]
    logged = [row for row in history if "train/loss" in items(row.item)]
    trained = list({row.step.num: row for row in reversed(logged)}.values())[::-1]  # a server keeps the first
    assert sorted(row.step.num for row in trained) == list(range(1, NUM_STEPS + 1))
    trained.sort(key=lambda row: row.step.num)
    restarts = [items(row.item)["train/restarts"] for row in trained]
    assert (restarts[0], restarts[-1]) == (0, 1)
    configs = [items(record.run.config.update) for record in read if record.HasField("run")]
    assert {entry["slurm.job_id"] for entry in configs} == {run.job_id}


def ranks(run: Run) -> list[int]:
    """Process ids of the run's ranks, in this machine's counting."""
    found = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = status.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"-m" in words and f"run_dir={run.folder}".encode() in words and b"srun" not in words[0]:
            found.append(int(status.parent.name))
    return sorted(found)


def test_1_kill_9_of_a_rank(submit, undisturbed, seen):
    run = submit()
    run.reaches(15)
    os.kill(ranks(run)[-1], signal.SIGKILL)
    steps, seconds = run.comes_back()
    run.ends()
    assert steps <= EVERY
    assert_same(run, undisturbed)
    seen(steps, seconds)


def test_2_power_cut_of_a_node_that_returns(submit, undisturbed, seen, cluster):
    run = submit()
    run.reaches(15)
    cluster.power_cut("node2")
    with ThreadPoolExecutor() as pool:
        back = pool.submit(run.comes_back)
        wait_for(lambda: "down" in cluster.run("sinfo", "-h", "-n", "node2", "-o", "%t"), 90)  # Slurm finds out itself
        cluster.power_on("node2")
        steps, seconds = back.result()
    run.ends()
    assert steps <= EVERY
    assert_same(run, undisturbed)
    seen(steps, seconds)


def test_3_power_cut_while_a_checkpoint_is_written(submit, undisturbed, seen, cluster):
    run = submit()
    checkpoints = run.folder / "checkpoints"
    run.reaches(EVERY + 5)
    wait_for(lambda: bool(list(checkpoints.glob("*.partial*"))), 60, every=0.001)
    cluster.power_cut("node1")  # the first rank's, which is the job's own too
    assert list(checkpoints.glob("*.partial*"))
    assert run.whole == [f"step-{EVERY:08d}.ckpt"]
    cluster.run("scontrol", "update", "nodename=node1", "state=down", "reason=power")  # as an operator would
    cluster.power_on("node1")
    steps, seconds = run.comes_back()
    run.ends()
    assert steps == EVERY
    assert_same(run, undisturbed)
    seen(steps, seconds)


def test_4_requeue(submit, undisturbed, seen, cluster):
    run = submit(None, "logger=wandb")
    run.reaches(15)
    cluster.run("scontrol", "requeue", run.job_id)
    steps, seconds = run.comes_back()
    run.ends()
    assert steps == 0  # there was time for a checkpoint
    assert_same(run, undisturbed)
    assert_one_wandb_run(run)
    seen(steps, seconds)


def test_5_time_limit(submit, undisturbed, seen):
    slow = ("+callbacks.slow._target_=slow.Slow", "+callbacks.slow.seconds=1.2")
    run = submit(None, "slurm.time=1", "slurm.signal_seconds=10", *slow)
    run.reaches(1)
    wait_for(lambda: "restart 1, failures 0" in run.log, 90)
    steps, seconds = run.comes_back()
    run.ends()
    assert steps == 0
    assert_same(run, undisturbed)
    seen(steps, seconds)


def test_6_preemption(submit, undisturbed, seen, cluster):
    run = submit()
    run.reaches(15)
    whole = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    cluster.run("sbatch", *whole, "--wrap=sleep 1")
    steps, seconds = run.comes_back()
    run.ends()
    assert steps <= EVERY
    assert_same(run, undisturbed)
    seen(steps, seconds)


@pytest.fixture(scope="module")
def cancelled(submit, cluster) -> Run:
    """A run that was cancelled behind its second checkpoint."""
    run = submit()
    run.reaches(2 * EVERY + 2)
    cluster.run("scancel", run.job_id)
    run.ends("CANCELLED")
    return run


def test_7_scancel_ends_it(cancelled, seen):
    with pytest.raises(TimeoutError):
        wait_for(lambda: cancelled.state != "CANCELLED", 10)  # a requeued job waits 5 s
    assert cancelled.whole[-1] == f"step-{cancelled.step:08d}.ckpt"
    seen(0, None)


def test_8_the_newest_checkpoint_is_truncated(cancelled, submit, undisturbed, seen):
    reached = cancelled.step
    newest = whole_checkpoints(cancelled.folder / "checkpoints")[-1]
    largest = max(newest.iterdir(), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1000)
    run = submit(cancelled.folder, "resume=auto")
    run.ends()
    assert f"{newest} is broken and skipped" in run.log
    assert_same(run, undisturbed)
    seen(reached - 2 * EVERY, None)


@pytest.fixture
def small_disk(cluster) -> Iterator[Path]:
    """A disk of 300 MB, which is there since before the nodes were."""
    yield cluster.small_disk
    for path in cluster.small_disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_9_the_disk_is_full(submit, undisturbed, seen, small_disk):
    run = submit(small_disk / "run")
    run.reaches(EVERY + 1)
    free = shutil.disk_usage(small_disk).free
    filler = small_disk / "filler"
    filler.write_bytes(bytes(free - 10 * 2**20))
    wait_for(lambda: "No space left on device" in run.log, 60)
    assert run.whole == [f"step-{EVERY:08d}.ckpt"]
    filler.unlink()
    steps, seconds = run.comes_back()
    run.ends()
    assert steps <= EVERY
    assert_same(run, undisturbed)
    seen(steps, seconds)


def test_10_wandb_is_unreachable(submit, undisturbed, seen, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    run = submit(None, "logger=wandb", "logger.mode=online", "slurm.offline=false")
    run.ends()
    assert "W&B can't be reached" in run.log
    assert len(list(run.folder.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert run.step == NUM_STEPS
    assert_same(run, undisturbed)
    seen(0, None)
