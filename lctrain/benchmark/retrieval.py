"""Comparison of a learned head pattern with random ones: recall and perplexity by the share of heads that stream."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from matplotlib import rc_context
from omegaconf import DictConfig

from lctrain.benchmark.retrieval_report import FULL, LEARNED, RANDOM, STREAMING, picture, row, table
from lctrain.cache.base import CachePolicy
from lctrain.cache.duo import DuoCache
from lctrain.cache.full import FullCache
from lctrain.config import public
from lctrain.errors import InputError
from lctrain.evaluation.base import Result, Task
from lctrain.evaluation.pictures import draw
from lctrain.evaluation.reader import Reader
from lctrain.evaluation.report import versions
from lctrain.evaluation.run import begin, check, check_cache, device, evaluate, journal, plain, stamp, texts
from lctrain.evaluation.style import STYLE
from lctrain.folder import RunFolder
from lctrain.heads import HeadPattern
from lctrain.tables import show

READ = (
    "model",
    "data",
    "datamodule",
    "evaluation",
    "retrieval",
    "sequence_length",
    "seed",
    "kernel",
)  # config keys used


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to choose the heads that stream; `seed` is set for random heads only."""

    kind: str
    share: float
    seed: int | None
    cache: CachePolicy

    @property
    def label(self) -> str:
        parts = [self.kind]
        parts += [f"{100 * self.share:g}%"] if self.kind in (LEARNED, RANDOM) else []
        return " ".join(parts + ([f"seed {self.seed}"] if self.seed is not None else []))


def retrieval(cfg: DictConfig) -> dict[str, Any]:
    """Measure every task of `evaluation` under every arm: full attention, the learned heads at each share, random heads
    at the same shares, every head streaming. All arms use one model and differ only in its cache.

    Write retrieval.json and pictures into run_dir. With resume=auto, continue with the next cell.
    """
    folder = RunFolder(cfg.run_dir)
    begin(cfg, folder)
    if cfg.retrieval.pattern is None or "path" not in cfg.model:
        raise InputError("benchmark retrieval needs model.path=… and retrieval.pattern=…, the gates that were learned")
    recipe = plain(cfg, cfg.model.path)
    recipe.check([cfg.sequence_length], device())
    data = texts(cfg, recipe)
    check(cfg, recipe.config(), data)
    tasks: dict[str, Task] = instantiate(cfg.evaluation, _convert_="all")
    if not any(task.generates for task in tasks.values()):
        raise InputError("benchmark retrieval needs a task of recall: evaluation=default, passkey or needle")
    shares = list(cfg.retrieval.streaming_shares)
    if not shares or shares != sorted(set(shares)) or cfg.retrieval.num_seeds < 1:
        raise InputError(f"retrieval.streaming_shares={shares} must ascend, and retrieval.num_seeds be at least 1")
    arms = list(_arms(cfg.retrieval))
    for arm in arms:
        for task in tasks.values():
            check_cache(arm.cache, recipe.attention, recipe.config(), task)
    with journal(cfg, folder) as cells:
        cells.require("the weights", stamp(recipe))
        reader = Reader(
            model=recipe.build(device()).eval(),  # type: ignore[arg-type]
            tokenizer=recipe.tokenizer,
            prefill_chunk_size=cfg.retrieval.prefill_chunk_size,
        )
        results = {
            arm.label: evaluate(replace(reader, cache=arm.cache), data, tasks, cells, label=arm.label) for arm in arms
        }
    return _write(cfg, arms, results)


def _arms(settings: DictConfig) -> Iterator[Arm]:
    asked = {name: settings[name] for name in ("num_sink_tokens", "recent_size") if settings[name] is not None}
    learned = replace(HeadPattern.read(settings.pattern), **asked)

    def streaming(pattern: HeadPattern, share: float) -> CachePolicy:
        return DuoCache(pattern=replace(pattern, threshold=None, streaming_share=share), positions="text")

    yield Arm(kind=FULL, share=0.0, seed=None, cache=FullCache())
    for share in settings.streaming_shares:
        yield Arm(kind=LEARNED, share=share, seed=None, cache=streaming(learned, share))
    for share in settings.streaming_shares:
        for seed in range(settings.num_seeds):
            gates = np.random.default_rng(seed).random(np.shape(learned.gates))
            drawn = replace(learned, gates=tuple(map(tuple, gates.tolist())))
            yield Arm(kind=RANDOM, share=share, seed=seed, cache=streaming(drawn, share))
    yield Arm(kind=STREAMING, share=1.0, seed=None, cache=streaming(learned, 1.0))


def _write(cfg: DictConfig, arms: Sequence[Arm], results: Mapping[str, Mapping[str, Result]]) -> dict[str, Any]:
    folder, full = Path(cfg.run_dir), results[FULL]
    rows = [row(arm.label, arm.kind, arm.share, arm.seed, results[arm.label], full) for arm in arms]
    told = {
        "arms": rows,
        "versions": versions(),
        "config": {name: value for name, value in public(cfg).items() if name in READ},
        "details": results,
    }
    (folder / "retrieval.json").write_text(json.dumps(told, indent=2) + "\n")
    draw(folder, {arm.label: results[arm.label] for arm in arms if arm.kind != RANDOM})
    with rc_context(STYLE):
        for task in rows[0]["recall"]:
            picture(task, rows).savefig(folder / f"{task}_by_share.png")
    show(table(rows))
    print(f"retrieval.json and pictures in {folder}")
    return told
