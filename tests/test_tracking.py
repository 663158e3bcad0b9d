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

from launch.main import main
from lctrain import config as configs
from lctrain import tracking
from lctrain.errors import InputError
from lctrain.export import export
from lctrain.folder import read_tracked

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
    trained = run(*overrides)
    tracking.finish(trained.loggers, tmp_path / "run/config.yaml")
    rows = trained.history
    del trained  # which holds the folder
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert f"W&B: offline; upload with: wandb sync {folder}" in caplog.text
    (file,) = folder.glob("*.wandb")
    read = finished(file)
    history = [items(record.history.item) for record in read if record.HasField("history")]
    steps = [row for row in history if "train/loss" in row]
    for row, logged in zip(rows, steps, strict=True):
        assert {name: logged[f"train/{name}"] for name in row if name != "step"} == {
            name: value for name, value in row.items() if name != "step"
        }
        assert logged["trainer/global_step"] == row["step"]
    validated = [row for row in history if "validation/perplexity" in row]
    assert [row["trainer/global_step"] for row in validated] == [2, 4]
    assert validated[-1]["train/tokens"] == rows[-1]["tokens"]  # the axis of both
    buckets = {name for name in validated[-1] if name.startswith("validation/perplexity_by_position/")}
    assert buckets == {f"validation/perplexity_by_position/{i}_of_8" for i in range(1, 9)}
    config = {}
    for record in read:
        config |= items(record.config.update) if record.HasField("config") else {}
        config |= items(record.run.config.update) if record.HasField("run") else {}
    assert config["sequence_length"] == 64
    assert config["rope"] == "LinearScaling"
    assert config["note"] == "***"
    assert 30 < len(config) < 100  # each setting once
    axes = {metric.glob_name or metric.name: metric for record in read if record.HasField("metric")
            for metric in [record.metric]}  # fmt: skip
    assert axes["train/*"].step_metric or axes["train/*"].step_metric_index
    assert axes["train/loss"].summary.min
    assert next(record.run.git.commit for record in read if record.HasField("run"))
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in caplog.text

    monkeypatch.setattr(sys, "argv", ["lctrain"])
    time.sleep(1)  # W&B names a run's folder by the second
    tracking.finish(run(*overrides, "resume=auto", "trainer.max_steps=6", "curriculum.num_steps=4").loggers)
    files = [path for path in (tmp_path / "run/wandb").glob("offline-run-*/*.wandb") if path != file]
    starts = [record.run.run_id for path in (file, *files) for record in records(path) if record.HasField("run")]
    assert len(files) == 1
    assert len(set(starts)) == 1
    added = [record.history for record in finished(files[0]) if record.HasField("history")]
    logged = [items(row.item) for row in added]
    assert [row["trainer/global_step"] for row in logged if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert {row.step.num for row in added} == {1, 2, 3, 4, 5, 6}  # W&B's own axis


def test_an_unreachable_server_costs_seconds_and_nothing_else(run, tmp_path, offline, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert tracking.INIT_TIMEOUT <= 30
    monkeypatch.setattr(tracking, "INIT_TIMEOUT", 2)
    start = time.monotonic()
    trained = run("logger=wandb", "trainer.max_steps=2")
    assert trained.steps == 2
    tracking.finish(trained.loggers)
    assert time.monotonic() - start < 30
    assert "W&B can't be reached" in caplog.text
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))) == 1
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"a" * 40 in path.read_bytes()]


SETTINGS: dict[str, Any] = {
    "project": None, "entity": None, "name": None, "group": None, "tags": None, "notes": None, "mode": "auto",
}  # fmt: skip


@pytest.mark.parametrize("key", ["", "too-short"])
def test_without_a_key_that_could_be_one_it_records_offline(tmp_path, offline, monkeypatch, key):
    monkeypatch.setenv("WANDB_API_KEY", key)
    logger = tracking.WandB(folder=str(tmp_path / "a run"), **SETTINGS)
    assert not (tmp_path / "a run").exists()  # before it is used
    assert logger.experiment.settings._offline
    assert (logger.experiment.project, logger.experiment.name) == ("lctrain", "a run")
    logger.finish()


def test_wandbs_own_variables_decide_what_no_setting_does(tmp_path, offline, monkeypatch):
    for name, value in {"PROJECT": "p", "NAME": "n", "RUN_GROUP": "g", "TAGS": "a,b", "MODE": "disabled"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    logger = tracking.WandB(folder=str(tmp_path / "run"), **SETTINGS)
    assert logger.experiment.disabled
    logger.finish()
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = tracking.WandB(folder=str(tmp_path / "run"), **SETTINGS | {"name": "mine"})
    run = logger.experiment
    assert (run.project, run.name, run.group, run.tags) == ("p", "mine", "g", ("a", "b"))
    logger.finish()


def test_a_wrong_setting_or_a_missing_package_is_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"logger.mode=onlin is none of auto, online, offline, disabled"):
        run("logger=wandb", "logger.mode=onlin")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match=r"logger: .*mlflow"):
        run("logger=mlflow")
    assert not (tmp_path / "run").exists()


def test_a_sweep_is_a_run_for_each_value_in_one_group(small, tmp_path, offline, monkeypatch):
    """`--multirun` runs its jobs in one process."""
    words = small("logger=wandb", "trainer.max_steps=1", f"run_dir={tmp_path}/sweep/${{hydra:job.num}}")
    sweep = ["optimizer.lr=1e-3,1e-2", f"hydra.sweep.dir={tmp_path}/sweep", "--multirun"]
    monkeypatch.setattr(sys, "argv", ["lctrain", "train", *words, *sweep])
    main()
    found = {}
    for number in (0, 1):
        (file,) = (tmp_path / f"sweep/{number}/wandb").glob("offline-run-*/*.wandb")
        read = finished(file)
        (run,) = [record.run for record in read if record.HasField("run")]
        config = items(run.config.update)
        losses = [record for record in read if record.HasField("history")]
        found[run.run_id] = (run.run_group, run.display_name, config["optimizer.lr"], len(losses))
    rates = sorted(rate for _, _, rate, _ in found.values())
    assert rates == [1e-3, 1e-2]
    assert {group for group, *_ in found.values()} == {"sweep"}
    assert len({number for *_, number in found.values()}) == 1


def test_an_evaluation_joins_the_group_of_the_training(run, saved, tmp_path, offline):
    trained = run("logger=wandb", "logger.group=mine", "trainer.max_steps=1")
    tracking.finish(trained.loggers)
    exported = export(str(tmp_path / "run"), "auto", str(tmp_path / "run/exported"))
    cfg = configs.compose("evaluate", [f"model.path={exported}", "logger=wandb", f"run_dir={tmp_path}/evaluated"])
    (logger,) = tracking.loggers_of(cfg)
    tracking.describe([logger], cfg, "evaluate")
    experiment = logger.experiment
    assert (experiment.group, experiment.job_type, experiment.name) == ("mine", "evaluate", "evaluated")
    assert experiment.config["model.path"] == str(exported)
    logger.finish()


def test_the_id_is_kept_in_the_folder(tmp_path, offline):
    ids = []
    for _ in range(2):
        logger = tracking.WandB(folder=str(tmp_path / "run"), **SETTINGS)
        ids.append(logger.experiment.id)
        logger.finish()
        time.sleep(1)
    assert ids[0] == ids[1]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/wandb_id.txt").write_text("abcd\n")
    assert read_tracked(tmp_path / "old") == {"id": "abcd"}


def test_many_loggers_record_the_same(run, tmp_path, offline):
    tracking.finish(run("logger=many", "logger.wandb.mode=offline", "trainer.max_steps=1").loggers)
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert (tmp_path / "run/csv/version_0/metrics.csv").exists()


def test_csv_holds_the_same_history(run, tmp_path):
    rows = run("logger=csv").history
    lines = (tmp_path / "run/csv/version_0/metrics.csv").read_text().splitlines()
    losses = [dict(zip(lines[0].split(","), line.split(","), strict=True))["loss"] for line in lines[1:]]
    assert [float(loss) for loss in losses if loss] == [row["loss"] for row in rows]


def test_a_service_that_is_gone_stops_nothing(tmp_path, offline, caplog):
    """Slurm's SIGTERM goes to W&B's own process too, which ends at once."""
    logger = tracking.WandB(folder=str(tmp_path), **SETTINGS | {"mode": "offline"})

    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionResetError

    logger.experiment.finish()
    logger._experiment = type("Gone", (), {"log": gone, "__call__": gone})()
    logger.log_metrics({"loss": 2.0}, step=2)
    assert "W&B did not take step 2 (ConnectionResetError)" in caplog.text


def test_gates_come_as_pictures_of_their_steps(run, tmp_path, offline):
    duo = ["attention=duo", "attention.num_sink_tokens=2", "attention.recent_size=4", "tuning=gates", "objective=duo"]
    tracking.finish(run("logger=wandb", "callbacks=gates", "callbacks.gates.every_num_steps=3", *duo).loggers)
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    rows = [items(record.history.item) for record in finished(file) if record.HasField("history")]
    drawn = {row["trainer/global_step"]: row for row in rows if any("gates/heatmap" in name for name in row)}
    assert list(drawn) == [3, 4]  # every third, and the last
    assert all({"train/loss/hidden_state", "train/loss/gates", "gates/mean"} <= row.keys() for row in drawn.values())
    assert len([*file.parent.glob("files/media/images/gates/*.png")]) == 2
