"""Timing of whole training steps: lengths × attention × tuning, compared with peers."""

import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from lctrain.benchmark.measure import Measured, measure
from lctrain.benchmark.points import DOES_NOT_FIT, Points, device_name, fingerprint, last_line, versions
from lctrain.config import conf_dir, nearest
from lctrain.errors import DoesNotFit, InputError
from lctrain.tables import show

PEERS = ("trl", "assembly")


def step(cfg: DictConfig) -> list[dict[str, Any]]:
    """Time steps of a model of the configured shape with random weights, and those of the peers.

    A peer runs its own attention and LoRA. Write each result into run_dir/step.jsonl as soon as it is measured.
    """
    if unknown := [peer for peer in cfg.peers if peer not in PEERS]:
        raise InputError(f"peers: {unknown[0]} is none of {', '.join(PEERS)}")
    points = Points(Path(cfg.run_dir) / "step.jsonl", cfg.minutes)
    for attention in cfg.attentions or [None]:
        cases = [choose(cfg, attention=attention, tuning=tuning) for tuning in cfg.tunings or [None]]
        for peer in cfg.peers:
            _ask(points, cfg, peer, kind(cases[0], "attention"))
        for case, length in product(cases, cfg.lengths):
            points.measure(label(case) | {"length": length}, partial(_measured, case, length))
    show(table(points.rows))
    print(points.told())
    return points.rows


def _measured(cfg: DictConfig, length: int) -> dict[str, Any]:
    try:
        measured: Measured = measure(cfg, length, num_steps=cfg.num_steps, budget=cfg.step_seconds)
    except (torch.OutOfMemoryError, DoesNotFit):
        return {"seconds": [], "error": DOES_NOT_FIT}
    return asdict(measured)


def kind(cfg: DictConfig, group: str) -> str:
    """Return the name of the module that a group's `_target_` lies in, such as `shifted_sparse`."""
    return str(cfg[group]._target_).split(".")[-2]


def label(cfg: DictConfig) -> dict[str, Any]:
    """Return the fields that identify a row: stack, attention, tuning, precision and a hash of other settings."""
    tuning = cfg.tuning._target_.split(".")[-1]
    trainable = [*cfg.tuning.get("trainable", [])]
    return {
        "stack": "lctrain",
        "attention": kind(cfg, "attention"),
        "tuning": tuning + (f" and {', '.join(trainable)}" if trainable else ""),
        "precision": cfg.precision,
        "config": fingerprint(cfg.model, cfg.objective, cfg.optimizer, cfg.strategy),
    }


def choose(cfg: DictConfig, **choices: str | None) -> DictConfig:
    """Return `cfg` with other files chosen for the named groups; None leaves a group as it is."""
    changed = cfg.copy()
    for group, name in choices.items():
        if name is None:
            continue
        file = conf_dir() / group / f"{name}.yaml"
        if not file.is_file():
            names = sorted(path.stem for path in file.parent.glob("*.yaml"))
            raise InputError(nearest(f"no {group} '{name}'", name, names, show_all=True))
        OmegaConf.update(changed, group, _load(file), merge=False)
    return changed


def _load(file: Path) -> DictConfig:
    """Load a file of a group, merged over the files of its `defaults` list."""
    node = OmegaConf.load(file)
    assert isinstance(node, DictConfig)
    bases = [_load(file.with_name(f"{name}.yaml")) for name in node.pop("defaults", []) if name != "_self_"]
    return cast(DictConfig, OmegaConf.merge(*bases, node))


def _ask(points: Points, cfg: DictConfig, peer: str, attention: str) -> None:
    """Measure a peer, in a process of its own for each length."""
    config = instantiate(cfg.model, _convert_="all").base_config()
    architecture = {key: value for key, value in config.to_dict().items() if key not in ("dtype", "use_cache")}
    row = {
        "stack": peer,
        "attention": attention,
        "tuning": "lora",
        "precision": None,
        "config": fingerprint(OmegaConf.create(architecture)),
    }
    for length in cfg.lengths:
        settings = {
            "architecture": architecture,
            "attention": attention,
            "length": length,
            "num_steps": cfg.num_steps,
            "seconds": cfg.step_seconds,
        }
        points.measure(row | {"length": length}, partial(_answer, peer, settings))


def _answer(peer: str, settings: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", f"lctrain.benchmark.peers.{peer}", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    answers = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("PEER ")]
    return answers[0] if answers else {"seconds": [], "error": last_line(done.stderr)}


def write(target: Path, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write the rows as JSON, with the device, the versions and `more`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    found = {"device": device_name(), "versions": versions(), "rows": rows} | more
    target.write_text(json.dumps(found, indent=2) + "\n")


def table(rows: list[dict[str, Any]]) -> Table:
    """Return a table with a line per row: what was measured, its speed and its memory."""
    memories = {"device_memory": "GiB", "pinned_memory": "on host", "memory": "memory"}
    shown = Table(
        "stack", "attention", "tuning", "tokens", "tokens/s", "step, s", "fastest, slowest", *memories.values()
    )
    for row in rows:
        seconds = median(row["seconds"]) if row["seconds"] else None
        length = row["length"]
        shown.add_row(
            row["stack"] + (f" {row['precision']}" if row["precision"] else ""),
            row["attention"],
            row["tuning"],
            f"{length:,}" if length else "",
            f"{length / seconds:,.0f}" if seconds else str(row.get("error")),
            f"{seconds:.2f}" if seconds else "",
            f"{min(row['seconds']):.2f}, {max(row['seconds']):.2f} of {len(row['seconds'])}" if seconds else "",
            *(_told(row.get(name, "")) for name in memories),
        )
    return shown


def _told(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1f}"
