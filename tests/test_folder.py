"""One process in a folder, and only whole checkpoints out of it."""

import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lctrain.errors import InputError
from lctrain.folder import RunFolder, is_whole, whole_checkpoints


@pytest.fixture
def folder(tmp_path):
    """With three checkpoints, of two ranks each."""
    found = RunFolder(tmp_path)
    for step in (1, 2, 3):
        checkpoint = found.checkpoints / f"step-{step:08d}.ckpt"
        checkpoint.mkdir(parents=True)
        for name in ("state.pt", "rank-00000-of-00002.pt", "rank-00001-of-00002.pt"):
            torch.save({"step": step, "weights": torch.ones(1000)}, checkpoint / name)
    return found


def names(paths):
    return [path.stem for path in paths]


def test_what_resume_means(folder, tmp_path):
    newest = folder.checkpoints / "step-00000003.ckpt"
    assert folder.resume_from("auto") == newest
    assert folder.resume_from(str(newest)) == newest
    empty = RunFolder(tmp_path / "empty")
    assert empty.resume_from("auto") is None
    assert empty.resume_from("never") is None
    assert empty.resume_from(str(newest)) == newest
    assert not empty.path.exists()


@pytest.mark.parametrize(
    ("resume", "line"),
    [
        ("never", "already holds a run; add resume=auto to go on with it, or choose another run_dir"),
        ("nowhere.ckpt", "resume=nowhere.ckpt is not a whole checkpoint; use a checkpoint's path, auto or never"),
        ("{}/checkpoints", "is not a whole checkpoint"),
        ("{}/checkpoints/step-00000002.ckpt", "already holds a run that is past"),
    ],
)
def test_a_resume_that_would_lose_something_is_refused(folder, resume, line):
    with pytest.raises(InputError, match=line):
        folder.resume_from(resume.format(folder.path))


@pytest.mark.parametrize("left", ["config.yaml", "metrics.jsonl", "report.json", "checkpoints/step-00000001.ckpt"])
def test_what_a_run_left_is_never_written_over_unasked(tmp_path, left, monkeypatch):
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_text("broken, if it were a checkpoint")
    with pytest.raises(InputError, match="already holds a run; add resume=auto"):
        RunFolder(tmp_path).resume_from("never")
    monkeypatch.setenv("LOCAL_RANK", "1")  # started by the first process, which has written its config by then
    assert RunFolder(tmp_path).resume_from("never") is None


def test_auto_does_not_start_over_beside_broken_checkpoints(folder):
    for path in folder.checkpoints.glob("*/rank-00000-*"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"every checkpoint in .* is broken, the newest is step-00000003\.ckpt"):
        folder.resume_from("auto")


def test_auto_says_that_it_starts_from_the_beginning(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = RunFolder(tmp_path)
    assert folder.resume_from("auto") is None
    folder.acquire()
    assert folder.resume_from("auto") is None
    assert caplog.text.count("starting from the first step") == 1


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["state.pt", "rank-00001-of-00002.pt"])
@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_newest_gives_way_to_the_one_before(folder, keep, name, first, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "0" if first else "1")
    newest = folder.checkpoints / "step-00000003.ckpt"
    whole = (newest / name).read_bytes()
    (newest / name).write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    assert folder.resume_from("auto").stem == "step-00000002"
    assert f"{newest} is broken and skipped" in caplog.text


@pytest.mark.parametrize("name", ["state.pt", "rank-00000-of-00002.pt", "rank-00001-of-00002.pt"])
def test_a_file_that_is_not_there_breaks_a_checkpoint(folder, name):
    (folder.checkpoints / "step-00000003.ckpt" / name).unlink()
    assert folder.resume_from("auto").stem == "step-00000002"


def test_a_changed_byte_is_never_taken_for_what_was_written(folder):
    path = folder.checkpoints / "step-00000003.ckpt/rank-00001-of-00002.pt"
    whole, chance = path.read_bytes(), random.Random(0)
    expected = torch.load(path, weights_only=True)["weights"]
    num_broken = 0
    for _ in range(300):
        at = chance.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
        if not is_whole(path.parent):
            num_broken += 1
            continue
        with suppress(RuntimeError):  # a field that only torch reads
            assert torch.equal(torch.load(path, weights_only=True)["weights"], expected)
    assert num_broken > 200


def test_unfinished_and_foreign_files_are_no_checkpoints(folder):
    for name in ("step-00000004.partial", "last.ckpt", "notes.txt"):
        (folder.checkpoints / name).write_bytes(b"x")
    assert names(whole_checkpoints(folder.checkpoints)) == ["step-00000001", "step-00000002", "step-00000003"]


def test_a_second_process_is_refused_until_the_first_has_ended_however(tmp_path):
    hold = """import sys, time
from lctrain.folder import RunFolder
folder = RunFolder(sys.argv[1])
folder.acquire()
print('held', flush=True)
time.sleep(60)"""
    first = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"another process is running in {tmp_path}/run; choose another run_dir"):
            RunFolder(tmp_path / "run").acquire()
    finally:
        first.kill()
        first.wait()
    RunFolder(tmp_path / "run").acquire()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/run"):
        RunFolder(Path(tmp_path / "file" / "run")).acquire()
