"""How long a row can be: peak memory by length with each saving alone, up to the first that does not fit."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from lctrain.benchmark.measure import measure
from lctrain.benchmark.step import choose, label, show, write
from lctrain.memory.savings import NOTHING, Savings

LADDER: dict[str, Savings] = {
    name: replace(NOTHING, **fields)  # type: ignore[arg-type]
    for name, fields in {
        "nothing": {},
        "checkpoint": {"checkpoint_layers": "all"},
        "checkpoint, MLP tiled": {"checkpoint_layers": "all", "mlp_tile": 8192},
        "checkpoint, attention kept": {"checkpoint_layers": "all", "save_attention": "all"},
        "checkpoint every 4": {"checkpoint_layers": "all", "checkpoint_every": 4},
        "checkpoint, offload": {"checkpoint_layers": "all", "offload": "all"},
    }.items()
}


def length(cfg: DictConfig) -> list[dict[str, Any]]:
    """One whole optimizer step at each of `lengths`, ascending; with `memory` given, of that alone.

    Writes length.json into run_dir after every row.
    """
    target = Path(cfg.run_dir) / "length.json"
    rows: list[dict[str, Any]] = []
    for attention in cfg.attentions or [None]:
        for tuning in cfg.tunings or [None]:
            case = choose(cfg, attention=attention, tuning=tuning)
            for savings in LADDER.values() if cfg.ladder else [None]:
                for num_tokens in sorted(cfg.lengths):
                    rows.append(label(case) | _one_step(case, num_tokens, savings))
                    write(target, rows)
                    if "error" in rows[-1]:
                        break
    show(rows, target)
    return rows


def _one_step(cfg: DictConfig, num_tokens: int, savings: Savings | None) -> dict[str, Any]:
    try:
        return asdict(measure(cfg, num_tokens, num_steps=1, warm_up=0, memory=savings))
    except torch.OutOfMemoryError:
        return {"length": num_tokens, "seconds": [], "error": "out of memory", "memory": str(savings)}
