"""Run the configured tasks on one model, or on several to compare them, with one progress bar per model."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedConfig

from lctrain.attention.base import Attention
from lctrain.attention.full import FullAttention
from lctrain.cache.base import CachePolicy
from lctrain.cache.full import FullCache
from lctrain.config import dump, public
from lctrain.errors import InputError
from lctrain.evaluation.base import Cell, Result, Task, Texts
from lctrain.evaluation.journal import Journal
from lctrain.evaluation.reader import Reader
from lctrain.evaluation.report import log_media, numbers, table, write_report
from lctrain.folder import TRACES, RunFolder, write_aside
from lctrain.memory.savings import NOTHING
from lctrain.model.recipe import ModelRecipe, PretrainedModel
from lctrain.model.tuning import Frozen
from lctrain.rope.none import NoScaling
from lctrain.tables import show
from lctrain.tracking import WandB, describe, finish, loggers_of

ELSEWHERE = ("run_dir", "resume", "logger")  # settings that do not influence what is measured


class Training(Protocol):
    """The facts about a training that the report includes."""

    @property
    def steps(self) -> int: ...
    @property
    def tokens_per_second(self) -> float: ...
    @property
    def history(self) -> list[dict[str, float]]: ...
    @property
    def loggers(self) -> list[Logger]: ...


def main(cfg: DictConfig) -> None:
    """Run `lctrain evaluate`. Raise InputError before anything is written."""
    folder = RunFolder(cfg.run_dir)
    begin(cfg, folder)
    recipe = instantiate(cfg.model, _convert_="all")
    recipe.check([cfg.sequence_length], device())
    check(cfg, recipe.config(), texts(cfg, recipe))
    loggers = loggers_of(cfg)
    with journal(cfg, folder) as cells:
        describe(loggers, cfg, "evaluate")
        report(cfg, {"model": recipe}, loggers, cells)
    finish(loggers, folder.config, folder.path / "report.json")


def begin(cfg: DictConfig, folder: RunFolder) -> None:
    """Raise InputError if run_dir holds a run that this evaluation can't or may not resume."""
    if cfg.resume not in ("never", "auto"):
        raise InputError(f"resume={cfg.resume} is neither never nor auto: an evaluation goes on in its own run_dir")
    if cfg.resume == "never" and any((folder.path / name).exists() for name in TRACES):
        raise InputError(
            f"{folder.path} already holds a run; add resume=auto to go on with an evaluation, or choose another run_dir"
        )
    folder.check_settings(dump(cfg), cfg.resume, ELSEWHERE)


def journal(cfg: DictConfig, folder: RunFolder) -> Journal:
    """Lock the folder, write the settings into it, and return the journal of the cells measured there before."""
    folder.acquire()
    write_aside(folder.config, dump(cfg))
    return Journal(folder.path / "cells.jsonl")


def check(cfg: DictConfig, config: PreTrainedConfig, data: Texts) -> None:
    """Raise InputError if the evaluation that `cfg` asks for can't be done on this data. Cheap."""
    tasks: dict[str, Task] = instantiate(cfg.evaluation, _convert_="all")
    method: Attention = instantiate(cfg.evaluation_attention, _convert_="all")
    cache = _cache(cfg)
    for name, task in tasks.items():
        task.check(task.documents(data), data.tokenizer)
        method.check(config.get_text_config(), list(task.context_lengths))
        check_cache(cache, method, config, task, cfg.get("prefill_chunk_size"))
        if task.generates and not method.can_decode():
            raise InputError(f"{method} can't decode, as evaluation.{name} does; evaluate another pattern")


def check_cache(
    cache: CachePolicy, method: Attention, config: PreTrainedConfig, task: Task, chunk_size: int | None = None
) -> None:
    """Raise InputError if the cache does not fit the model, the task's longest row, or the attention method."""
    cache.check(config.get_text_config(), task.context_lengths[-1])
    if cache.decides and not isinstance(method, FullAttention):
        raise InputError(
            f"{type(cache).__name__} decides itself what heads see, instead of {method}; use attention=full"
        )
    if cache.forgets_between_forwards and not task.generates and chunk_size is None:
        raise InputError(
            f"{type(cache).__name__} forgets between forwards, and this task reads a row in one, as full attention "
            "would; set prefill_chunk_size"
        )


def report_training(cfg: DictConfig, folders: Mapping[str, str], training: Training) -> None:
    """Measure the models in `folders` (label → path), loaded as plain transformers does, and write the run's report."""
    told = {"steps": training.steps, "tokens_per_second": training.tokens_per_second, "history": training.history}
    recipes = {label: plain(cfg, path) for label, path in folders.items()}
    report(cfg, recipes, training.loggers, Journal(), **told)


def report(
    cfg: DictConfig, recipes: Mapping[str, ModelRecipe], loggers: Sequence[Logger], cells: Journal, **told: Any
) -> None:
    """Measure each model in the same way on the config's data; write, print and log the results."""
    tasks = instantiate(cfg.evaluation, _convert_="all")
    results = {}
    for label, recipe in recipes.items():
        cells.require(f"the weights of {label}", stamp(recipe))
        model: Any = recipe.build(device()).eval()
        chunk = cfg.get("prefill_chunk_size")
        reader = Reader(model=model, tokenizer=recipe.tokenizer, cache=_cache(cfg), prefill_chunk_size=chunk)
        results[label] = evaluate(reader, texts(cfg, recipe), tasks, cells, label=label)
        del model, reader
        gc.collect()
    settings = {name: value for name, value in public(cfg).items() if name not in ELSEWHERE}
    write_report(Path(cfg.run_dir), results, config=settings, **told)
    for logger in loggers:
        if isinstance(logger, WandB):
            logger.tell("the report", lambda run: log_media(run, Path(cfg.run_dir), results))
        else:
            logger.log_metrics(numbers(results))
    show(table(results))
    print(f"report.json, pictures and more in {cfg.run_dir}")


def device() -> str:
    """Return the device on which models are measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def texts(cfg: DictConfig, recipe: ModelRecipe) -> Texts:
    """Return the config's corpus, tokenized by the model's tokenizer."""
    data: Texts = instantiate(cfg.datamodule, tokenizer=recipe.tokenizer, _convert_="all")
    return data


def stamp(recipe: ModelRecipe) -> list[list[Any]]:
    """Return name, size and time of each weights file in a model's folder; a hub model, known by revision, has none."""
    files = sorted(Path(getattr(recipe, "path", "")).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _cache(cfg: DictConfig) -> CachePolicy:
    """Return the configured cache policy; after a training none is configured, and it is the full cache."""
    policy: CachePolicy = instantiate(cfg.cache, _convert_="all") if "cache" in cfg else FullCache()
    return policy


def plain(cfg: DictConfig, path: str) -> PretrainedModel:
    """Return the model as plain transformers loads it, under the pattern to evaluate."""
    return PretrainedModel(
        path=path,
        revision=cfg.model.get("revision", "main"),
        use_safetensors=cfg.model.get("use_safetensors", True),
        trust_remote_code=cfg.model.get("trust_remote_code", False),
        dtype=cfg.model.dtype,
        memory=NOTHING,
        attention=instantiate(cfg.evaluation_attention, _convert_="all"),
        rope=NoScaling(),
        tuning=Frozen(),
        sequence_length=cfg.sequence_length,
        kernel=cfg.kernel,
        layer_kernel=cfg.layer_kernel,
        precision=None,
    )


def evaluate(
    reader: Reader,
    data: Texts,
    tasks: Mapping[str, Task],
    cells: Journal,
    *,
    label: str = "evaluate",
    progress: bool = True,
) -> dict[str, Result]:
    """Return each task's result, with metric and unit, under its name in `tasks`.

    Cells in the journal under `label` are not measured again.

    The progress bar begins with `label` and counts the remaining work. Every task is checked before any runs.
    """
    for task in tasks.values():
        task.check(task.documents(data), reader.tokenizer)
    text = TextColumn("{task.description}")
    with Progress(text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), disable=not progress) as bar:
        left = sum(task.num_units() for task in tasks.values())
        line = bar.add_task(label, total=left)

        def advance(doing: str, num_units: float) -> None:
            bar.update(line, description=f"{label}: {doing}", advance=num_units)

        def once(name: str, cell: Cell, num_units: float, measure: Callable[[], Any]) -> Any:
            nonlocal left
            if (label, name, *cell) in cells:
                left -= num_units
                bar.update(line, total=left)
            return cells.once((label, name, *cell), measure)

        return {
            name: asdict(task.quantity) | task.run(reader, task.documents(data), partial(once, name), advance)
            for name, task in tasks.items()
        }
