"""Stopping, failing, going on: only the steps since the last checkpoint are lost, and those come out the same."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lctrain.errors import InputError, RunError
from lctrain.folder import RunFolder, rank_files
from lctrain.training.checkpoint import Checkpoint
from lctrain.training.generators import restore_rng, rng_state

HERE = Path(__file__).parent
STEPS = "step-%08d.ckpt"
EVERY_STATE = [  # dropout, a growing length, accumulation, momentum: all that a resumed run could get wrong
    *("tuning=lora", "tuning.lora_dropout=0.2", "curriculum=staged", "trainer.accumulate_grad_batches=2"),
    *("trainer.max_steps=20", "trainer.val_check_interval=6", "callbacks.checkpoint.every_num_steps=7"),
]


def sabotage(callback: str, **fields: Any) -> list[str]:
    """Overrides that add a callback of `sabotage`."""
    given = [f"+callbacks.sabotage.{field}={value}" for field, value in fields.items()]
    return [f"+callbacks.sabotage._target_=sabotage.{callback}", *given]


@pytest.fixture(autouse=True)
def sabotage_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)


def history(folder: Path) -> list[tuple[int, float, float, int]]:
    """What must not differ of each step: its number, loss, gradient norm and length."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["sequence_length"]) for row in rows]


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def load(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint, by file."""
    return {file.name: torch.load(file, weights_only=True) for file in sorted(path.glob("*.pt"))}


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    found = {} if isinstance(node, dict | list | tuple) else {prefix: node}
    for key, value in items:
        found |= flat(value, f"{prefix}/{key}")
    return found


def differing(a: Path, b: Path) -> list[str]:
    """The entries of two checkpoints that are not the same to the bit."""
    ours, theirs = flat(load(a)), flat(load(b))
    pairs = {name: (ours.get(name), theirs.get(name)) for name in ours.keys() | theirs.keys()}
    return sorted(
        n for n, (x, y) in pairs.items() if not (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y)
    )


def lctrain(overrides: list[str]) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "launch", "train", *overrides]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_and_resumed_is_the_run_that_was_not_killed(run, small, tmp_path):
    killed = lctrain(small(f"run_dir={tmp_path}/killed", *EVERY_STATE, *sabotage("Signal", name="SIGKILL", step=10)))
    run(f"run_dir={tmp_path}/whole", *EVERY_STATE)
    assert (killed.wait(60), killed.communicate()[1]) == (-signal.SIGKILL, "")
    assert [step for step, *_ in history(tmp_path / "killed")] == list(range(1, 10))
    assert written(tmp_path / "killed") == [STEPS % 7]
    run(f"run_dir={tmp_path}/killed", *EVERY_STATE, "resume=auto")
    whole, resumed = history(tmp_path / "whole"), history(tmp_path / "killed")
    assert whole == resumed
    assert [step for step, *_ in whole] == list(range(1, 21))
    assert {length for *_, length in whole} == {16, 32, 64}
    ends = tmp_path / "whole/checkpoints" / (STEPS % 20), tmp_path / "killed/checkpoints" / (STEPS % 20)
    assert differing(*ends) == []
    assert written(tmp_path / "whole") == written(tmp_path / "killed") == [STEPS % 14, STEPS % 20]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_signal_ends_the_run_behind_the_step_with_one_checkpoint(run, tmp_path, name, micro_batch):
    before = signal.getsignal(signal.SIGTERM)
    length = "trainer.accumulate_grad_batches=2"
    with pytest.raises(RunError, match=f"stopped by {name} after step 2; go on with resume=auto"):
        run(length, *sabotage("Signal", name=name, step=2, micro_batch=micro_batch))
    assert written(tmp_path / "run") == [STEPS % 2]
    assert signal.getsignal(signal.SIGTERM) is before  # evaluation behind the training can be stopped too
    assert run(length, "resume=auto").steps == 4
    assert [step for step, *_ in history(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_stopped_run_exits_with_1_and_one_line_and_says_little_else(small, tmp_path):
    stopped = lctrain(small(*sabotage("Signal", name="SIGTERM", step=3)))
    stdout, stderr = stopped.communicate(timeout=60)
    assert stopped.returncode == 75
    assert [line for line in stderr.splitlines() if "tokenizing" not in line] == [
        "stopped by SIGTERM after step 3; go on with resume=auto"
    ]
    assert not [word for word in ("Tip", "GPU", "TPU", "weights_only", "Warning", "Loading") if word in stdout]
    assert len(stdout.splitlines()) == len(set(stdout.splitlines()))
    assert written(tmp_path / "run") == [STEPS % 3]


def test_a_signal_while_writing_leaves_that_checkpoint_whole(run, tmp_path):
    saves = "callbacks.checkpoint.every_num_steps=2"
    with pytest.raises(RunError, match="stopped by SIGTERM after step 3"):
        run(saves, *sabotage("SignalWhileWriting", name="SIGTERM", step=2))
    assert written(tmp_path / "run") == [STEPS % 2, STEPS % 3]
    assert all(load(tmp_path / "run/checkpoints" / name) for name in written(tmp_path / "run"))


def test_nothing_is_left_of_a_run_that_is_past_its_end(run, caplog):
    run("trainer.max_steps=2", "scheduler.num_steps=4")
    assert run("trainer.max_steps=1", "scheduler.num_steps=4", "resume=auto").steps == 2
    assert "step 2 of trainer.max_steps=1: nothing is left" in caplog.text


def test_the_folder_is_held_until_what_trained_is_reported(run, tmp_path):
    trained = run("trainer.max_steps=1")
    with pytest.raises(InputError, match="another process is running"):
        RunFolder(tmp_path / "run").acquire()
    del trained
    gc.collect()
    RunFolder(tmp_path / "run").acquire()


def test_a_kill_while_writing_leaves_the_one_before(run, tmp_path):
    """The write goes to a file of another name: what a kill leaves there is no checkpoint and is written over."""
    run("callbacks.checkpoint.every_num_steps=2", "trainer.max_steps=2", "scheduler.num_steps=4")
    half = (tmp_path / "run/checkpoints" / (STEPS % 4)).with_suffix(".partial")
    half.mkdir()
    (half / "rank-00001-of-00002.pt").write_bytes(b"half")
    assert run("resume=auto").steps == 4
    assert written(tmp_path / "run") == [STEPS % 2, STEPS % 4]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_older_checkpoint(run, small_disk):
    disk, saves = f"callbacks.checkpoint.folder={small_disk}/checkpoints", "callbacks.checkpoint.every_num_steps=2"
    full = sabotage("FullDisk", folder=small_disk, step=3)
    with pytest.raises(RunError, match=r"checkpoint of step 4 could not be written to .*No space left on device"):
        run(disk, saves, *full)
    assert written(small_disk) == [STEPS % 2]
    assert load(small_disk / "checkpoints" / (STEPS % 2))["state.pt"]["global_step"] == 2


@pytest.mark.parametrize(("module", "function"), [(torch, "save"), (os, "fsync")])
def test_a_write_that_fails_anywhere_leaves_the_older_checkpoint(run, tmp_path, monkeypatch, module, function):
    """The same where no file system may be mounted."""
    saves = "callbacks.checkpoint.every_num_steps=2"
    run(saves, "trainer.max_steps=2", "scheduler.num_steps=4")

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, function, refuse)
        with pytest.raises(RunError, match="No space left on device"):
            run(saves, "resume=auto")
    assert written(tmp_path / "run") == [STEPS % 2]
    assert run(saves, "resume=auto").steps == 4


def test_the_newest_num_kept_stay(run, tmp_path):
    run("trainer.max_steps=7", "callbacks.checkpoint.every_num_steps=1", "callbacks.checkpoint.num_kept=3")
    assert written(tmp_path / "run") == [STEPS % 5, STEPS % 6, STEPS % 7]


def test_minutes_count_too(run, tmp_path):
    run("callbacks.checkpoint.every_num_minutes=1e-9", "callbacks.checkpoint.num_kept=9")
    assert written(tmp_path / "run") == [STEPS % step for step in (1, 2, 3, 4)]


def test_a_broken_newest_is_skipped_with_a_warning_and_never_crowds_out_a_whole_one(run, tmp_path, caplog):
    saves = ["callbacks.checkpoint.every_num_steps=2", "callbacks.checkpoint.num_kept=1"]
    run("callbacks.checkpoint.every_num_steps=2")
    newest = tmp_path / "run/checkpoints" / (STEPS % 4)
    file = rank_files(newest)[0]
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(RunError, match="after step 3"):
        run(*saves, "resume=auto", *sabotage("Signal", name="SIGTERM", step=3))
    assert f"{newest} is broken and skipped" in caplog.text
    assert written(tmp_path / "run") == [STEPS % 3, STEPS % 4]
    assert run(*saves, "resume=auto").steps == 4
    assert written(tmp_path / "run") == [STEPS % 4]
    assert load(newest)["state.pt"]["global_step"] == 4


def test_a_checkpoint_holds_only_what_trains_and_no_code(run, tmp_path):
    run("tuning=longlora")
    state = load(tmp_path / "run/checkpoints" / (STEPS % 4))["rank-00000-of-00001.pt"]["parameters"]  # weights_only
    names = list(state)
    assert sum(".lora_" in name for name in names) == 2 * 4 * 2  # A and B, q k v o, layers
    assert all(".lora_" in name or "embed" in name or "norm" in name for name in names)
    assert all(entries.keys() == {"value", "exp_avg", "exp_avg_sq", "step"} for entries in state.values())


def test_the_random_states_come_back():
    state = rng_state()
    drawn = random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002  the global ones
    restore_rng(state)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == drawn  # noqa: NPY002


@pytest.mark.parametrize("field", ["num_kept", "every_num_steps", "every_num_minutes"])
def test_settings_that_cannot_work_are_refused(field):
    settings: dict[str, Any] = {"every_num_steps": 1, "every_num_minutes": 1.0, "num_kept": 1}
    with pytest.raises(InputError, match=f"callbacks.checkpoint.{field}"):
        Checkpoint(folder="nowhere", **{**settings, field: 0})
