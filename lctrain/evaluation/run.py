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
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lctrain.attention.base import Attention
from lctrain.config import public
from lctrain.errors import InputError
from lctrain.evaluation.base import Result, Task, Tokens
from lctrain.evaluation.report import log_media, table, write_report
from lctrain.folder import RunFolder
from lctrain.memory.savings import NOTHING
from lctrain.model.recipe import ModelRecipe, PretrainedModel
from lctrain.model.tuning import Frozen
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
    recipe = instantiate(cfg.model, _convert_="all")
    recipe.check([cfg.sequence_length], _device())
    check(cfg, recipe.config(), _documents(cfg, recipe))
    folder.acquire()
    loggers = [instantiate(cfg.logger, _convert_="all")] if cfg.logger else []
    report(cfg, {"model": recipe}, loggers=loggers)


def check(cfg: DictConfig, config: PreTrainedConfig, documents: Sequence[Tokens]) -> None:
    """Raise InputError if the evaluation that `cfg` asks for can't be done on these documents: cheap."""
    tasks: dict[str, Task] = instantiate(cfg.evaluation, _convert_="all")
    method: Attention = instantiate(cfg.evaluation_attention, _convert_="all")
    for name, task in tasks.items():
        task.check(documents)
        method.check(config.get_text_config(), list(task.context_lengths))
        if task.generates and not method.can_decode():
            raise InputError(f"{method} can't decode, as evaluation.{name} does; evaluate another pattern")


def report_training(cfg: DictConfig, folders: Mapping[str, str], training: Training) -> None:
    """Measure the models in `folders`, label → path, as plain transformers loads them, for the run's report."""
    told = {"steps": training.steps, "tokens_per_second": training.tokens_per_second, "history": training.history}
    report(cfg, {label: _plain(cfg, path) for label, path in folders.items()}, training.loggers, **told)


def report(cfg: DictConfig, recipes: Mapping[str, ModelRecipe], loggers: Sequence[Logger], **told: Any) -> None:
    """Measure each model on the config's held-out documents, alike; write, show and log what came out."""
    tasks = instantiate(cfg.evaluation, _convert_="all")
    results = {}
    for label, recipe in recipes.items():
        model: Any = recipe.build(_device()).eval()
        results[label] = evaluate(model, recipe.tokenizer, _documents(cfg, recipe), tasks, label=label)
        del model
        gc.collect()
    write_report(Path(cfg.run_dir), results, config=public(cfg), **told)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            log_media(logger.experiment, Path(cfg.run_dir), results)
    Console().print(table(results))
    print(f"report.json, pictures and more in {cfg.run_dir}")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _documents(cfg: DictConfig, recipe: ModelRecipe) -> list[Tokens]:
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
