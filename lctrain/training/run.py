"""Run a training: instantiate everything from the config, with the cheapest checks first."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import lightning
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from lctrain.attention.base import Attention
from lctrain.attention.duo import DuoAttention
from lctrain.checkpoint import read_state
from lctrain.config import dump
from lctrain.data.datamodule import LongContextData
from lctrain.errors import InputError, RunError
from lctrain.evaluation.run import check as check_evaluation
from lctrain.folder import RunFolder, read_history, write_aside
from lctrain.model.recipe import ModelRecipe
from lctrain.plan.run import resolve
from lctrain.rope.none import NoScaling
from lctrain.tracking import describe, loggers_of
from lctrain.training.gates import Gates
from lctrain.training.metrics import Metrics
from lctrain.training.strategy import ShardedCheckpoints, ZeRO
from lctrain.training.watchdog import Watchdog

log = logging.getLogger(__name__)

# Prefixes of the keys that may change between a run and its continuation without changing what step N computes.
FREE_TO_CHANGE = (
    *("run_dir", "resume", "logger", "callbacks.", "evaluation.", "evaluation_attention.", "hydra."),
    *("memory.", "model.memory.", "module.recipe.memory."),
    *("datamodule.cache_dir", "trainer.max_steps", "trainer.val_check_interval", "trainer.enable_"),
    # How a step is divided; `_check_tokens_per_step` requires that it stays the same step.
    *("strategy.", "trainer.strategy.", "trainer.devices", "trainer.num_nodes", "trainer.accumulate_grad_batches"),
    *("sequence_parallel_size", "datamodule.sequence_parallel_size", "datamodule.micro_batch_size", "slurm."),
)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The result of a training run, besides the files in its folder."""

    steps: int
    tokens_per_second: float
    history: list[dict[str, float]]
    loggers: list[Logger]
    is_global_zero: bool
    folder: RunFolder  # locked for as long as this object lives


def train(cfg: DictConfig) -> Trained:
    """Train as `cfg` says, into `cfg.run_dir`.

    Raises InputError before anything is written, and RunError if the run can't go on.
    """
    folder = RunFolder(cfg.run_dir)
    folder.resume_from(cfg.resume)
    folder.check_settings(dump(cfg), cfg.resume, FREE_TO_CHANGE)
    if cfg.trainer.max_steps < 1:
        raise InputError(f"trainer.max_steps={cfg.trainer.max_steps} must be at least 1")
    if str(cfg.trainer.precision) not in ("32-true", "bf16-mixed", "32"):
        raise InputError(
            f"trainer.precision={cfg.trainer.precision} is neither 32-true nor bf16-mixed; set model.dtype"
        )
    _quiet()
    module = instantiate(cfg.module, _convert_="all")
    datamodule = instantiate(cfg.datamodule, tokenizer=module.recipe.tokenizer, _convert_="all")
    trainer, loggers = _trainer(cfg), loggers_of(cfg)
    device = trainer.strategy.root_device
    _check_positions(module.recipe)
    _check_strategy(cfg, trainer, module.recipe)
    module.recipe = resolve(cfg, module.recipe, datamodule.curriculum.lengths(), device, trainer.world_size)
    module.recipe.check(datamodule.curriculum.lengths(), device.type, cfg.sequence_parallel_size)
    _check_trained(module.recipe)
    module.check(device)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Gates):
            callback.check(module.recipe.attention)
    datamodule.trainer = trainer
    _check_tokens_per_step(folder.resume_from(cfg.resume), datamodule)
    datamodule.prepare_data()
    datamodule.setup("fit")
    if cfg.evaluation:  # refuse its settings now, not after the last step
        _check_evaluated(cfg, module.recipe.attention)
        check_evaluation(cfg, module.recipe.config(), datamodule)
    if trainer.is_global_zero:
        folder.acquire()
    checkpoint = folder.resume_from(cfg.resume)  # again: before `acquire` another process may have written one
    if trainer.is_global_zero:
        _tell_if_over(checkpoint, cfg.trainer.max_steps)
        write_aside(folder.config, dump(cfg))  # replaced at once, as other ranks may be reading it
    trainer.loggers = loggers
    describe(loggers, cfg, "train")
    lightning.seed_everything(cfg.seed, verbose=False)  # only here: the checks above may have drawn random numbers
    _fit(trainer, module, datamodule, checkpoint)
    if module.validated_step != trainer.global_step:
        trainer.validate(module, datamodule, verbose=False)  # perplexity by position of the trained model
    metrics = next(callback for callback in trainer.callbacks if isinstance(callback, Metrics))  # type: ignore[attr-defined]
    return Trained(
        steps=trainer.global_step,
        tokens_per_second=metrics.tokens_per_second,
        history=read_history(metrics.history),
        loggers=trainer.loggers,
        is_global_zero=trainer.is_global_zero,
        folder=folder,
    )


def _tell_if_over(checkpoint: Path | None, max_steps: int) -> None:
    if checkpoint and (step := read_state(checkpoint)["global_step"]) >= max_steps:
        log.warning("%s is of step %d of trainer.max_steps=%d: nothing is left", checkpoint, step, max_steps)


def _fit(trainer: Trainer, module: LightningModule, datamodule: LongContextData, checkpoint: Path | None) -> None:
    """Call `trainer.fit`; raise RunError if memory ran out or if an exchange failed because a rank is gone."""
    try:
        trainer.fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
    except Exception as error:
        watchdogs = [callback for callback in trainer.callbacks if isinstance(callback, Watchdog)]  # type: ignore[attr-defined]
        if watchdogs and (told := watchdogs[0].explain(error)):
            raise RunError(told) from error
        raise


def _check_tokens_per_step(checkpoint: Path | None, datamodule: LongContextData) -> None:
    """Raise InputError if a continued run's steps have other numbers of tokens, over all ranks and micro-batches."""
    now = datamodule.tokens_per_step
    before = read_state(checkpoint)[type(datamodule).__qualname__]["tokens_per_step"] if checkpoint else now
    if before != now:
        raise InputError(
            f"{checkpoint} was written by steps of {before:,} tokens, these would be of {now:,}: keep the product of "
            "datamodule.micro_batch_size, trainer.accumulate_grad_batches and the devices that read different rows"
        )


def _check_strategy(cfg: DictConfig, trainer: Trainer, recipe: ModelRecipe) -> None:
    """Raise InputError for a strategy that can't train this recipe."""
    if cfg.precision == "fp8" and cast(ShardedCheckpoints, trainer.strategy).zero3 is not None:
        raise InputError("precision=fp8 holds whole matrices and stage 3 shards them; use strategy=zero2")
    whole = recipe.tuning.trains_all and recipe.autocasts() and not recipe.attention.learns
    if cfg.strategy.get("half_precision") and not whole:
        raise InputError(
            "strategy.half_precision is for tuning=full with model.dtype=bfloat16 and an attention that learns "
            "nothing; set it to false"
        )
    if isinstance(trainer.strategy, ZeRO) and "bf16" in str(cfg.trainer.precision):
        raise InputError("ZeRO trains in model.dtype: use model.dtype=bfloat16 instead of trainer.precision=bf16-mixed")
    if cfg.trainer.num_nodes > 1 and trainer.world_size == 1:
        raise InputError(f"strategy=single is for one process, trainer.num_nodes={cfg.trainer.num_nodes}; use ddp")


def _check_evaluated(cfg: DictConfig, trained: Attention) -> None:
    """Raise InputError if the evaluation would leave out what the attention learns, or take it for other settings."""
    evaluated = instantiate(cfg.evaluation_attention, _convert_="all")
    if trained.learns and not isinstance(trained, DuoAttention) and evaluated != trained:  # Duo's is a head pattern
        raise InputError(
            f"{trained} learns, and would be evaluated as {evaluated}; give attention@evaluation_attention="
            f"{trained.name} the same settings, or evaluation=none"
        )


def _check_trained(recipe: ModelRecipe) -> None:
    """Raise InputError if nothing trains."""
    if not any(parameter.requires_grad for parameter in recipe.skeleton(recipe.config()).parameters()):
        raise InputError(f"{recipe.tuning} leaves nothing to train; choose another tuning")


def _check_positions(recipe: ModelRecipe) -> None:
    original = getattr(recipe.base_config().get_text_config(), "max_position_embeddings", recipe.sequence_length)
    if isinstance(recipe.rope, NoScaling) and not recipe.rope.extrapolate and recipe.sequence_length > original:
        raise InputError(
            f"rope=none leaves the model at {original} positions, model.sequence_length is {recipe.sequence_length}; "
            "choose a rope (yarn, linear, …), or say that it is meant with rope.extrapolate=true"
        )


def _trainer(cfg: DictConfig) -> Trainer:
    callbacks = list(instantiate(cfg.callbacks, _convert_="all").values())
    # Under srun, Lightning's own requeueing would save inside a signal handler.
    plugins = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    settings = {"default_root_dir": cfg.run_dir, "callbacks": callbacks, "plugins": plugins, "logger": False}
    try:
        return instantiate(cfg.trainer, **settings, _convert_="all")  # type: ignore[no-any-return]
    except InstantiationException as error:
        if isinstance(error.__cause__, MisconfigurationException | ValueError):  # such as a device that is not there
            raise InputError(f"trainer: {error.__cause__}") from error
        raise


def _quiet() -> None:
    """Silence Lightning's messages about itself, such as device counts and tips, but not its warnings."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
