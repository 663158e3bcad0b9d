"""Run the configured tasks on one model behind one progress bar, or on several to compare them."""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lctrain.config import public
from lctrain.errors import InputError
from lctrain.evaluation.base import Result, Task, Tokens
from lctrain.evaluation.report import log_media, table, write_report
from lctrain.folder import RunFolder
from lctrain.model.recipe import PretrainedModel
from lctrain.model.tuning import FullTuning
from lctrain.rope.none import NoScaling


class Training(Protocol):
    """What a report tells of the training before it."""

    @property
    def steps(self) -> int: ...
    @property
    def tokens_per_second(self) -> float: ...
    @property
    def history(self) -> list[dict[str, float]]: ...
    @property
    def loggers(self) -> list[Logger]: ...


def main(cfg: DictConfig) -> None:
    """`lctrain evaluate`. Raises InputError before anything is written."""
    folder = RunFolder(cfg.run_dir)
    if (folder.path / "report.json").exists():
        raise InputError(f"{folder.path} already holds a report; choose another run_dir")
    recipe = _plain(cfg, cfg.model.path)
    recipe.check([cfg.sequence_length])
    documents = _documents(cfg, recipe)
    for task in instantiate(cfg.evaluation, _convert_="all").values():
        task.check(documents)
    folder.acquire()
    report(cfg, {"model": cfg.model.path})


def report(cfg: DictConfig, folders: Mapping[str, str], training: Training | None = None) -> None:
    """Measure each folder's model on the config's held-out documents, alike; write, show and log what came out."""
    tasks = instantiate(cfg.evaluation, _convert_="all")
    results = {}
    for label, path in folders.items():
        recipe = _plain(cfg, path)
        model: Any = recipe.build("cuda" if torch.cuda.is_available() else "cpu").eval()
        results[label] = evaluate(model, recipe.tokenizer, _documents(cfg, recipe), tasks, label=label)
        del model
        gc.collect()
    told: dict[str, Any] = {}
    if training is not None:
        told = {"steps": training.steps, "tokens_per_second": training.tokens_per_second, "history": training.history}
    write_report(Path(cfg.run_dir), results, config=public(cfg), **told)
    for logger in training.loggers if training else ():
        if isinstance(logger, WandbLogger):
            log_media(logger.experiment, Path(cfg.run_dir), results)
    Console().print(table(results))
    print(f"report.json, pictures and more in {cfg.run_dir}")


def _documents(cfg: DictConfig, recipe: PretrainedModel) -> list[Tokens]:
    datamodule = instantiate(cfg.datamodule, tokenizer=recipe.tokenizer, _convert_="all")
    documents: list[Tokens] = datamodule.heldout_documents()
    return documents


def _plain(cfg: DictConfig, path: str) -> PretrainedModel:
    """The model as plain transformers loads it, under the pattern that is to be evaluated."""
    return PretrainedModel(
        path=path,
        revision=cfg.model.get("revision", "main"),
        use_safetensors=cfg.model.get("use_safetensors", True),
        trust_remote_code=cfg.model.get("trust_remote_code", False),
        dtype=cfg.model.dtype,
        gradient_checkpointing=False,
        attention=instantiate(cfg.evaluation_attention, _convert_="all"),
        rope=NoScaling(),
        tuning=FullTuning(),
        sequence_length=cfg.sequence_length,
        kernel=cfg.kernel,
    )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Tokens],
    tasks: Mapping[str, Task],
    *,
    label: str = "evaluate",
    progress: bool = True,
) -> dict[str, Result]:
    """Each task's result under its name in `tasks`. `label` opens the bar; every task is checked before any runs."""
    for task in tasks.values():
        task.check(documents)
    text = TextColumn("{task.description}")
    with Progress(text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), disable=not progress) as bar:
        line = bar.add_task(label, total=sum(task.num_units() for task in tasks.values()))

        def advance(doing: str, num_units: float) -> None:
            bar.update(line, description=f"{label}: {doing}", advance=num_units)

        return {name: task.run(model, tokenizer, documents, advance) for name, task in tasks.items()}
