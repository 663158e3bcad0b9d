"""Measurement of the longest row: peak memory by length with each saving alone, up to the first that does not fit."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from lctrain.benchmark.measure import measure
from lctrain.benchmark.points import DOES_NOT_FIT, Points
from lctrain.benchmark.step import choose, label, table
from lctrain.errors import DoesNotFit
from lctrain.memory.savings import NOTHING, Savings
from lctrain.tables import show

ALL = {"checkpoint_layers": "all"}
LADDER: dict[str, Savings] = {
    name: replace(NOTHING, **fields)  # type: ignore[arg-type]
    for name, fields in {
        "nothing": {},
        "checkpoint": ALL,
        "checkpoint, MLP tiled": ALL | {"mlp_tile": 8192},
        "checkpoint, attention kept": ALL | {"save_attention": "all"},
        "checkpoint every 4": ALL | {"checkpoint_every": 4},
        "checkpoint, offload": ALL | {"offload": "all"},
        "checkpoint, heads at a time": ALL | {"kv_heads_at_a_time": 1},
    }.items()
}


def length(cfg: DictConfig) -> list[dict[str, Any]]:
    """Measure one whole optimizer step at each of `lengths`, ascending, up to the first that does not fit.

    With `ladder`, it runs with the loss in tiles instead of Liger's, with each saving alone, and with memory=auto; else
    as configured. Write each result into run_dir/length.jsonl as soon as it is measured.
    """
    points = Points(Path(cfg.run_dir) / "length.jsonl", cfg.minutes)
    for attention, tuning in product(cfg.attentions or [None], cfg.tunings or [None]):
        case = choose(cfg, attention=attention, tuning=tuning)
        for name, changed, savings in _rungs(case) if cfg.ladder else [(None, case, None)]:
            for num_tokens in sorted(cfg.lengths):
                point = label(changed) | {"saving": name, "length": num_tokens}
                row = points.measure(point, partial(_one_step, changed, num_tokens, savings))
                if row is None or "error" in row:
                    break
    show(table(points.rows))
    print(points.told())
    return points.rows


def _rungs(cfg: DictConfig) -> Iterator[tuple[str, DictConfig, Savings | None]]:
    tiled = cfg.copy()
    tiled.objective.loss = "tiled"
    yield "tiled loss", tiled, NOTHING
    for name, savings in LADDER.items():
        yield name, cfg, savings
    yield "auto", choose(cfg, memory="auto"), None


def _one_step(cfg: DictConfig, num_tokens: int, savings: Savings | None) -> dict[str, Any]:
    try:
        return asdict(measure(cfg, num_tokens, num_steps=1, warm_up=0, memory=savings))
    except (torch.OutOfMemoryError, DoesNotFit):
        return {"seconds": [], "error": DOES_NOT_FIT, "memory": "auto" if savings is None else str(savings)}
