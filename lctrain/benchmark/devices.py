"""Whole training steps on several devices against one: sharded models, shared rows, by length up to the longest."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lctrain.benchmark.points import Points, last_line
from lctrain.benchmark.step import choose, label
from lctrain.config import nearest
from lctrain.errors import InputError

# name → tuning, strategy, whether all devices share each row
CASES: dict[str, tuple[str, str, bool]] = {
    "lora_shared": ("lora", "ddp", True),
    "lora_apart": ("lora", "ddp", False),
    "full_shared": ("full", "zero3", True),
    "full_apart": ("full", "zero3", False),
}


def devices(cfg: DictConfig) -> list[dict[str, Any]]:
    """Each of `devices.cases` and its tuning on one device, at `lengths`, ascending, up to the first that does not fit.

    Ranks are processes of this machine, started anew for every row of run_dir/devices.jsonl.
    """
    for name in cfg.devices.cases:
        if name not in CASES:
            raise InputError(nearest(f"devices.cases: no '{name}'", name, list(CASES), show_all=True))
    points = Points(Path(cfg.run_dir) / "devices.jsonl", cfg.minutes)
    for attention, name in product(cfg.attentions or [None], cfg.devices.cases):
        tuning, strategy, together = CASES[name]
        alone = choose(cfg, attention=attention, tuning=tuning, strategy="single")
        shared = choose(cfg, attention=attention, tuning=tuning, strategy=strategy)
        shared.trainer.devices = cfg.devices.num_devices
        shared.sequence_parallel_size = cfg.devices.num_devices if together else 1
        for case, layout in ((alone, "alone"), (shared, name)):
            for length in sorted(cfg.lengths):
                point = label(case) | {"layout": layout, "devices": case.trainer.devices, "length": length}
                row = points.measure(point, partial(_on_ranks, case, length, Path(cfg.run_dir)))
                if row is None or "error" in row:
                    break
    _show(points)
    return points.rows


def _on_ranks(cfg: DictConfig, length: int, folder: Path) -> dict[str, Any]:
    """What the first of the ranks answers, or the last line of one that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "rank.yaml"
    settings.write_text(OmegaConf.to_yaml(cfg, resolve=True))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = cfg.trainer.devices
    logs = [folder / f"rank-{rank}.log" for rank in range(size)]
    command = [sys.executable, "-m", "lctrain.benchmark.rank", str(settings), str(length)]
    ranks = [
        subprocess.Popen(command, env=_environment(rank, size, port), stdout=log.open("w"), stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    try:
        while any(codes := [rank.poll() for rank in ranks]) or None in codes:
            if failed := [log for log, code in zip(logs, codes, strict=True) if code]:
                return {"seconds": [], "error": last_line(failed[0].read_text(errors="replace"))}
            time.sleep(0.5)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    (answer,) = [line[5:] for line in logs[0].read_text().splitlines() if line.startswith("RANK ")]
    found: dict[str, Any] = json.loads(answer)
    return found


def _environment(rank: int, size: int, port: int) -> Mapping[str, str]:
    """What torchrun sets."""
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
    """Tokens/s, and how many times those of one device."""
    alone = {_kind(row): _rate(row) for row in points.rows if row["layout"] == "alone"}
    table = Table("layout", "devices", "attention", "tuning", "tokens", "tokens/s", "against one", "GiB", "memory")
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
            f"{row['device_memory']:.1f}" if rate else "",
            row.get("memory", ""),
        )
    Console(width=120).print(table)
    print(points.told())


def _kind(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["attention"], row["tuning"], row["length"]


def _rate(row: Mapping[str, Any]) -> float | None:
    return row["num_rows"] * row["length"] / median(row["seconds"]) if row["seconds"] else None
