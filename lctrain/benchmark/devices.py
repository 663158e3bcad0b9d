"""Timing of whole training steps on several devices against one: sharded models and shared rows, by length."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Self

from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from lctrain.benchmark.points import Points, last_line
from lctrain.benchmark.step import choose, label
from lctrain.config import nearest
from lctrain.errors import InputError
from lctrain.tables import show

TUNINGS, STRATEGIES, ROWS = ("lora", "full"), ("ddp", "zero2", "zero3"), ("shared", "apart")
CASES = {
    f"{tuning}_{strategy}_{rows}": (tuning, strategy, rows)
    for tuning, strategy, rows in product(TUNINGS, STRATEGIES, ROWS)
}


def devices(cfg: DictConfig) -> list[dict[str, Any]]:
    """Measure each of `devices.cases` at ascending `lengths`, up to the first that does not fit.

    A case is a tuning on one device, or a tuning, a strategy, and whether the devices share each row or each has its
    own. Ranks are processes on this machine, started anew for every case. Results go into run_dir/devices.jsonl.
    """
    for name in cfg.devices.cases:
        if name not in CASES and name not in TUNINGS:
            raise InputError(nearest(f"devices.cases: no '{name}'", name, [*TUNINGS, *CASES], show_all=True))
    points = Points(Path(cfg.run_dir) / "devices.jsonl", cfg.minutes)
    for attention, name in product(cfg.attentions or [None], cfg.devices.cases):
        case, layout = _case(cfg, attention, name)
        with Ranks(case, Path(cfg.run_dir) / "ranks") as ranks:
            for length in sorted(cfg.lengths):
                point = label(case) | {"layout": layout, "devices": case.trainer.devices, "length": length}
                row = points.measure(point, partial(ranks.measure, length))
                if row is None or "error" in row:
                    break
    _show(points)
    return points.rows


def _case(cfg: DictConfig, attention: str | None, name: str) -> tuple[DictConfig, str]:
    """Return the config of a case and its name in the table."""
    if name in TUNINGS:
        return choose(cfg, attention=attention, tuning=name, strategy="single"), "alone"
    tuning, strategy, rows = CASES[name]
    case = choose(cfg, attention=attention, tuning=tuning, strategy=strategy)
    case.trainer.devices = cfg.devices.num_devices
    if strategy == "zero3" and tuning == "full":
        case.strategy.half_precision = cfg.devices.half_precision
    case.sequence_parallel_size = cfg.devices.num_devices if rows == "shared" else 1
    return case, f"{strategy}, rows {rows}"


class Ranks:
    """The processes of one case, started at the first call of `measure`."""

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        self._cfg, self._folder = cfg, folder
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def measure(self, length: int) -> dict[str, Any]:
        """Return the answer of the first rank, or the last line of a rank that failed."""
        if not self._processes:
            self._start()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{length}\n")
            process.stdin.flush()
        answer = self._folder / f"{length}.json"
        while not answer.exists():
            for rank, process in enumerate(self._processes):
                if process.poll() is not None:
                    return {"seconds": [], "error": last_line(self._log(rank).read_text(errors="replace"))}
            time.sleep(0.2)
        found: dict[str, Any] = json.loads(answer.read_text())
        return found

    def _start(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        settings = self._folder / "config.yaml"
        settings.write_text(OmegaConf.to_yaml(self._cfg, resolve=True))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self._cfg.trainer.devices):
            with self._log(rank).open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "lctrain.benchmark.rank", str(settings)],
                    env=_environment(rank, self._cfg.trainer.devices, port),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            self._processes.append(process)

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.log"


def _environment(rank: int, size: int, port: int) -> Mapping[str, str]:
    """Return the environment variables that torchrun would set."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "benchmark",
    }


def _show(points: Points) -> None:
    """Print tokens/s, their ratio to one device, and the share of a step in which only exchanges run."""
    alone = {_kind(row): _rate(row) for row in points.rows if row["layout"] == "alone"}
    table = Table(
        "layout", "devices", "attention", "tuning", "tokens", "tokens/s", "against one", "waiting", "GiB", "memory"
    )
    for row in points.rows:
        rate, one = _rate(row), alone.get(_kind(row))
        table.add_row(
            row["layout"],
            str(row["devices"]),
            row["attention"],
            row["tuning"],
            f"{row['length']:,}",
            f"{rate:,.0f}" if rate else str(row["error"]),
            f"{rate / one:.2f}" if rate and one else "",
            f"{row['waiting'] / median(row['seconds']):.1%}" if row.get("waiting") is not None else "",
            f"{row['device_memory']:.1f}" if rate else "",
            row.get("memory", ""),
        )
    show(table)
    print(points.told())


def _kind(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["attention"], row["tuning"], row["length"]


def _rate(row: Mapping[str, Any]) -> float | None:
    return row["num_rows"] * row["length"] / median(row["seconds"]) if row["seconds"] else None
