"""How fast a whole training step is: lengths × attention × tuning, beside what others run."""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lctrain.benchmark.measure import Measured, measure
from lctrain.config import conf_dir, nearest
from lctrain.errors import InputError

PEERS = ("none", "trl", "assembly")
PACKAGES = ("torch", "transformers", "peft", "lightning", "triton", "liger-kernel", "flash-attn-4", "trl")


def step(cfg: DictConfig) -> list[dict[str, Any]]:
    """Medians over `num_steps` steps of a model of the configured shape with random weights, and the peer's.

    The peer's attention is its own, its tuning LoRA. Writes step.json into run_dir after every row.
    """
    if cfg.peer not in PEERS:
        raise InputError(f"peer={cfg.peer} is none of {', '.join(PEERS)}")
    target = Path(cfg.run_dir) / "step.json"
    rows: list[dict[str, Any]] = []
    for row in _rows(cfg):
        rows.append(row)
        write(target, rows)
    show(rows, target)
    return rows


def _rows(cfg: DictConfig) -> Iterator[dict[str, Any]]:
    for attention in cfg.attentions or [None]:
        if cfg.peer != "none":
            yield from ask_peer(cfg, cfg.peer, attention or kind(cfg, "attention"))
        for tuning in cfg.tunings or [None]:
            case = choose(cfg, attention=attention, tuning=tuning)
            for length in cfg.lengths:
                yield label(case) | _measured(case, length)


def _measured(cfg: DictConfig, length: int) -> dict[str, Any]:
    try:
        measured: Measured = measure(cfg, length, num_steps=cfg.num_steps)
    except torch.OutOfMemoryError:
        return {"length": length, "seconds": [], "error": "out of memory"}
    return asdict(measured)


def kind(cfg: DictConfig, group: str) -> str:
    """The module of what a group configures, which bears the file's name."""
    return str(cfg[group]._target_).split(".")[-2]


def label(cfg: DictConfig) -> dict[str, Any]:
    """What a row is of."""
    tuning = cfg.tuning._target_.split(".")[-1]
    trainable = [*cfg.tuning.get("trainable", [])]
    return {
        "stack": "lctrain",
        "attention": kind(cfg, "attention"),
        "tuning": tuning + (f" and {', '.join(trainable)}" if trainable else ""),
        "precision": cfg.precision,
    }


def choose(cfg: DictConfig, **choices: str | None) -> DictConfig:
    """`cfg` with other files of the named groups; None leaves a group as it is."""
    changed = cfg.copy()
    for group, name in choices.items():
        if name is None:
            continue
        file = conf_dir() / group / f"{name}.yaml"
        if not file.is_file():
            names = sorted(path.stem for path in file.parent.glob("*.yaml"))
            raise InputError(nearest(f"no {group} '{name}'", name, names, show_all=True))
        OmegaConf.update(changed, group, OmegaConf.load(file), merge=False)
    return changed


def ask_peer(cfg: DictConfig, peer: str, attention: str) -> Iterator[dict[str, Any]]:
    """What a peer measures of itself, in a process of its own."""
    config = instantiate(cfg.model, _convert_="all").base_config()
    settings = {
        "architecture": {key: value for key, value in config.to_dict().items() if key not in ("dtype", "use_cache")},
        "attention": attention,
        "lengths": list(cfg.lengths),
        "num_steps": cfg.num_steps,
    }
    command = [sys.executable, "-m", f"lctrain.benchmark.peers.{peer}", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    answers = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("PEER ")]
    for answer in answers or [{"length": None, "seconds": [], "error": done.stderr.strip().splitlines()[-1:]}]:
        yield {"stack": peer, "attention": attention, "tuning": "lora", "precision": None} | answer


def write(target: Path, rows: list[dict[str, Any]], **more: Any) -> None:
    """Rows with what they were measured on, and more, as JSON."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    versions = {name: _version(name) for name in PACKAGES}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"device": card, "versions": versions, "rows": rows} | more, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None


def show(rows: list[dict[str, Any]], target: Path) -> None:
    """The rows as a table."""
    table = Table("stack", "attention", "tuning", "tokens", "tokens/s", "step, s", "GiB", "memory")
    for row in rows:
        seconds = median(row["seconds"]) if row["seconds"] else None
        length = row["length"]
        table.add_row(
            row["stack"] + (f" {row['precision']}" if row["precision"] else ""),
            row["attention"],
            row["tuning"],
            f"{length:,}" if length else "",
            f"{length / seconds:,.0f}" if seconds else str(row.get("error")),
            f"{seconds:.2f}" if seconds else "",
            f"{row['device_memory']:.1f}" if "device_memory" in row else "",
            row.get("memory", ""),
        )
    Console().print(table)
    print(target)
