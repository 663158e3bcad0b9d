"""What W&B is told, read back from its own file; and that it never stands in a run's way."""

import json
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from lctrain.training import loggers

BLOCK, HEADER = 2**15, 7
SECRET = "f00dfacef00dface"


def records(path: Path) -> Iterator[Record]:
    """W&B's log: 7 bytes of magic, blocks of 32 KiB, in them pieces of records: crc32, length, kind (4: the last)."""
    data, at, whole = path.read_bytes(), HEADER, b""
    assert data[:HEADER] == b":W&B" + struct.pack("<HB", 0xBEE1, 0)
    while at + HEADER <= len(data):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + HEADER : at + HEADER + length]
        assert zlib.crc32(piece, zlib.crc32(bytes([kind]))) == checksum
        at, whole = at + HEADER + length, whole + piece
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


def finished(path: Path) -> list[Any]:
    """All records, once W&B's own process has written the last of them."""
    for _ in range(600):
        read = list(records(path))
        if any(record.HasField("exit") for record in read):
            return read
        time.sleep(0.1)
    raise AssertionError(f"W&B did not finish {path}")


def items(entries: Any) -> dict[str, Any]:
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nobody is logged in, and no run outlives its test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    wandb.finish()


def test_an_offline_run_holds_the_history_the_config_and_no_secret(run, tmp_path, offline, monkeypatch, caplog):
    monkeypatch.setenv("LCTRAIN_TEST_TOKEN", SECRET)
    monkeypatch.setattr(sys, "argv", ["lctrain", "train", f"+note={SECRET}"])
    overrides = [
        "logger=wandb",
        "curriculum=staged",
        "trainer.val_check_interval=2",
        f"+note={SECRET}",
        "scheduler.num_steps=8",
    ]
    caplog.set_level("INFO")
    rows = run(*overrides).history
    wandb.finish()
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert f"W&B: offline; upload with: wandb sync {folder}" in caplog.text
    (file,) = folder.glob("*.wandb")
    read = finished(file)
    history = [items(record.history.item) for record in read if record.HasField("history")]
    trained = [row for row in history if "loss" in row]
    for row, logged in zip(rows, trained, strict=True):
        assert {name: logged[name] for name in row if name != "step"} == {k: v for k, v in row.items() if k != "step"}
        assert logged["trainer/global_step"] == row["step"]
    validated = [row for row in history if "validation/perplexity" in row]
    assert [row["trainer/global_step"] for row in validated] == [2, 4]
    buckets = [name for name in validated[-1] if name.startswith("validation/perplexity_")]
    assert sorted(buckets) == sorted(f"validation/perplexity_{8 * i}-{8 * i + 8}" for i in range(8))
    config = {}
    for record in read:
        config |= items(record.config.update) if record.HasField("config") else {}
    assert config["sequence_length"] == 64
    assert config["rope"]["_target_"] == "lctrain.rope.linear.LinearScaling"
    assert config["note"] == "***"
    assert next(record.run.git.commit for record in read if record.HasField("run"))
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in caplog.text

    monkeypatch.setattr(sys, "argv", ["lctrain"])
    time.sleep(1)  # W&B names a run's folder by the second
    run(*overrides, "resume=auto", "trainer.max_steps=6", "curriculum.num_steps=4")
    wandb.finish()
    files = [path for path in (tmp_path / "run/wandb").glob("offline-run-*/*.wandb") if path != file]
    starts = [record.run.run_id for path in (file, *files) for record in records(path) if record.HasField("run")]
    assert len(files) == 1
    assert len(set(starts)) == 1
    added = [record.history for record in finished(files[0]) if record.HasField("history")]
    assert [items(row.item)["trainer/global_step"] for row in added if "loss" in items(row.item)] == [1, 2, 3, 4, 5, 6]
    assert {row.step.num for row in added} == {1, 2, 3, 4, 5, 6}  # W&B's own axis


def test_an_unreachable_server_costs_seconds_and_nothing_else(run, tmp_path, offline, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert loggers.INIT_TIMEOUT <= 30
    monkeypatch.setattr(loggers, "INIT_TIMEOUT", 2)
    start = time.monotonic()
    assert run("logger=wandb", "trainer.max_steps=2").steps == 2
    wandb.finish()
    assert time.monotonic() - start < 30
    assert "W&B can't be reached" in caplog.text
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))) == 1
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"a" * 40 in path.read_bytes()]


@pytest.mark.parametrize("key", ["", "too-short"])
def test_without_a_key_that_could_be_one_it_records_offline(tmp_path, offline, monkeypatch, key):
    monkeypatch.setenv("WANDB_API_KEY", key)
    logger = loggers.wandb_logger(project="p", entity=None, name="a run", folder=str(tmp_path / "run"), mode="auto")
    assert logger.experiment.settings._offline
    assert (logger.experiment.project, logger.experiment.name) == ("p", "a run")
    logger.experiment.finish()


def test_the_id_is_kept_in_the_folder(tmp_path):
    first = loggers._run_id(tmp_path / "id")
    assert loggers._run_id(tmp_path / "id") == first == (tmp_path / "id").read_text()
    assert loggers._run_id(tmp_path / "other") != first


def test_csv_holds_the_same_history(run, tmp_path):
    rows = run("logger=csv").history
    lines = (tmp_path / "run/csv/version_0/metrics.csv").read_text().splitlines()
    losses = [dict(zip(lines[0].split(","), line.split(","), strict=True))["loss"] for line in lines[1:]]
    assert [float(loss) for loss in losses if loss] == [row["loss"] for row in rows]


def test_a_service_that_is_gone_stops_nothing(tmp_path, offline, caplog):
    """Slurm's SIGTERM goes to W&B's own process too, which ends at once."""
    settings = {"project": "p", "entity": None, "name": None, "folder": str(tmp_path), "mode": "offline"}
    logger = loggers.wandb_logger(**settings)

    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionResetError

    logger.experiment.finish()
    logger._experiment = type("Gone", (), {"log": gone, "__call__": gone})()
    logger.log_metrics({"loss": 2.0}, step=2)
    assert "W&B did not take step 2 (ConnectionResetError)" in caplog.text


def test_gates_come_as_pictures_of_their_steps(run, tmp_path, offline):
    duo = ["attention=duo", "attention.num_sink_tokens=2", "attention.recent_size=4", "tuning=gates", "objective=duo"]
    run("logger=wandb", "callbacks=gates", "callbacks.gates.every_num_steps=3", *duo)
    wandb.finish()
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    rows = [items(record.history.item) for record in finished(file) if record.HasField("history")]
    drawn = {row["trainer/global_step"]: row for row in rows if any("gates/heatmap" in name for name in row)}
    assert list(drawn) == [3, 4]  # every third, and the last
    assert all({"loss/hidden_state", "loss/gates", "gates/mean"} <= row.keys() for row in drawn.values())
    assert len([*file.parent.glob("files/media/images/gates/*.png")]) == 2
