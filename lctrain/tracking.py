"""Make a run's loggers, and record it in Weights & Biases: named, grouped and comparable.

A run goes on where W&B can't be reached, or does not take a step or a file.
"""

import json
import logging
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lctrain.config import public
from lctrain.errors import InputError, Stopped
from lctrain.folder import TRACKED, read_history, read_tracked

log = logging.getLogger(__name__)

INIT_TIMEOUT = 20  # seconds that a server may take to answer before the run goes on without it
MODES = ("auto", "online", "offline", "disabled")
SLURM = {"job_id": "SLURM_JOB_ID", "nodes": "SLURM_JOB_NODELIST", "restarts": "SLURM_RESTART_COUNT"}
PACKAGES = ("lctrain", "torch", "transformers", "lightning", "deepspeed")
# Groups of the config that say what a run is; what others say follows from them, or is no setting to compare by.
TOLD = (
    *("model", "attention", "rope", "tuning", "data", "curriculum", "objective", "optimizer", "scheduler", "strategy"),
    *("memory", "cache", "datamodule", "trainer"),
)
UNTOLD = ("recipe", "callbacks", "plugins", "architecture")
TAGS = ("attention", "rope", "tuning")
SUMMARIES = {"train/loss": "min", "validation/perplexity": "min", "train/tokens_per_second": "max"}


class WandB(WandbLogger):
    """Lightning's W&B logger, begun when it is first used, as one run for each folder that is trained or evaluated.

    `mode` auto is online if a key is configured, and otherwise offline; W&B's own environment variables decide where a
    setting is null or auto (WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_RUN_GROUP, WANDB_TAGS, WANDB_NOTES,
    WANDB_MODE). Without either, the name is that of `folder`, and the group is the sweep or job array, or else the
    name of the folder, which evaluations of its export join. If W&B can't be reached, the run is recorded offline, and
    the log says how to sync it. A run that is resumed continues the same W&B run.

    Optimizer steps are W&B's own step axis. Otherwise W&B counts calls, and a run that is continued offline would count
    from 0 again. A step that is logged twice has the same values to the bit; a server keeps the first.
    """

    def __init__(
        self,
        *,
        folder: str,
        project: str | None,
        entity: str | None,
        name: str | None,
        group: str | None,
        tags: Sequence[str] | None,
        notes: str | None,
        mode: str,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"logger.mode={mode} is none of {', '.join(MODES)}")
        super().__init__(save_dir=folder)
        self._folder, self._mode = Path(folder), mode
        variable = os.environ.get
        self._settings: dict[str, Any] = {
            "project": project or variable("WANDB_PROJECT") or "lctrain",
            "entity": entity or variable("WANDB_ENTITY"),
            "name": name or variable("WANDB_NAME") or self._folder.name,
            "group": group or variable("WANDB_RUN_GROUP"),
            "tags": list(tags) if tags is not None else given.split(",") if (given := variable("WANDB_TAGS")) else None,
            "notes": notes or variable("WANDB_NOTES"),
        }
        self._config: dict[str, Any] = {}
        self._tokens = 0.0

    def describe(self, cfg: DictConfig, job_type: str) -> None:
        """Take the run's config, its kind and, where none are given, its tags and its group.

        Call it before anything is logged.
        """
        self._config, self._settings["job_type"] = described(cfg), job_type
        if self._settings["tags"] is None:
            names = [self._config[name] for name in TAGS if name in self._config]
            self._settings["tags"] = [*names, f"{cfg.sequence_length} tokens"]
        trained_in = Path(str(cfg.model.get("path", ""))).parent  # where the model is an export
        self._settings["group"] = self._settings["group"] or read_tracked(trained_in).get("group") or self._group()

    @property
    @rank_zero_experiment
    def experiment(self) -> wandb.Run:
        if self._experiment is None:
            self._experiment = self._begin()
        return cast(wandb.Run, self._experiment)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._tokens = metrics.get("tokens", self._tokens)
        elsewhere = tuple(name for name in metrics if name.startswith(("validation/", "gates/")))
        row = {name if name in elsewhere else f"train/{name}": value for name, value in metrics.items()}
        row |= {"train/tokens": self._tokens, "trainer/global_step": step or 0}
        self.tell(f"step {step}", lambda run: run.log(row, step=step))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Tell W&B of a failure by an alert, or that the run was preempted; `finish` ends the run."""
        if self._experiment is None or status == "success":
            return
        error, title = sys.exc_info()[1], f"{self._settings['name']} failed"
        if isinstance(error, Stopped):
            self.tell("the preemption", lambda run: run.mark_preempting())
        else:
            self.tell("the alert", lambda run: run.alert(title, f"{type(error).__name__}: {error}"))

    @rank_zero_only
    def finish(self, *files: Path) -> None:
        """End the run, so that the next one in this process is another, and keep `files`, a folder by reference."""
        if self._experiment is None:
            return
        self.tell("the run's files", lambda run: run.log_artifact(self._artifact(run.id, files)))
        self.tell("the end of the run", lambda run: run.finish())
        self._experiment = None

    @rank_zero_only
    def tell(self, what: str, call: Callable[[wandb.Run], object]) -> None:
        """Run `call` on W&B's run. Whatever fails there, training goes on: its folder has what W&B did not take."""
        try:
            call(self.experiment)
        except Exception as error:
            log.warning("W&B did not take %s (%s)", what, type(error).__name__)

    @staticmethod
    def _artifact(run_id: str, files: Sequence[Path]) -> wandb.Artifact:
        artifact = wandb.Artifact(f"run-{run_id}", type="run")
        for path in files:
            if path.is_dir():
                artifact.add_reference(path.absolute().as_uri(), checksum=False)
            elif path.is_file():
                artifact.add_file(str(path))
        return artifact

    def _group(self) -> str:
        """Return the name of what the run belongs to."""
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            return self._folder.parent.name
        if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
            return f"array-{array}"
        return self._folder.name

    def _begin(self) -> wandb.Run:
        self._folder.mkdir(parents=True, exist_ok=True)
        wandb.setup(wandb.Settings(silent=True))
        mode = self._chosen_mode()
        try:
            run = self._init(mode)
        except wandb.Error as error:
            log.warning("W&B can't be reached (%s); recording offline", str(error).splitlines()[0])
            wandb.teardown()  # otherwise the run's id stays taken
            mode = "offline"
            try:
                run = self._init(mode)
            except wandb.Error as refused:  # such as a project's name that W&B does not allow
                log.warning("W&B can't record this run (%s)", str(refused).splitlines()[0])
                mode, run = "disabled", self._init("disabled")
        log.info("W&B: %s", run.url or f"{mode}; upload with: wandb sync {Path(run.dir).parent}")
        state = {"id": run.id, "group": self._settings["group"], "url": run.url}
        (self._folder / TRACKED).write_text(json.dumps(state))
        for name in ("train/*", "validation/*"):
            run.define_metric(name, step_metric="train/tokens")
        for name, summary in SUMMARIES.items():
            run.define_metric(name, step_metric="train/tokens", summary=summary)
        if mode == "offline":  # W&B's process may have ended before it wrote all to disk: log what metrics.jsonl holds
            self._experiment = run
            for row in read_history(self._folder / "metrics.jsonl"):
                self.log_metrics({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))
        return run

    def _chosen_mode(self) -> str:
        wanted = self._mode if self._mode != "auto" else os.environ.get("WANDB_MODE", "auto")
        if wanted != "auto":
            return "offline" if wanted == "dryrun" else wanted
        try:
            return "online" if wandb.login(prompt=False, verify=False) else "offline"
        except wandb.Error:
            return "offline"

    def _init(self, mode: str) -> wandb.Run:
        return wandb.init(
            **self._settings,
            dir=str(self._folder),
            id=read_tracked(self._folder).get("id") or secrets.token_hex(4),
            resume="allow" if mode == "online" else None,
            mode=mode,  # type: ignore[arg-type]
            config=self._config,
            # No metadata: it holds the command line, which may contain a key. The commit is recorded without it.
            settings=wandb.Settings(init_timeout=INIT_TIMEOUT, silent=True, save_code=False, x_disable_meta=True),
        )


def described(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings to compare runs by, each once, with its group's name: `attention.sliding_window`.

    A group itself has the name of the class that it builds. Adds the machine and the versions.
    """
    plain = public(cfg)
    found = {name: value for name, value in plain.items() if not isinstance(value, dict)}
    for group in TOLD:
        node = plain.get(group) or {}
        if "_target_" in node:
            found[group] = node["_target_"].rpartition(".")[2]
        for field, value in node.items():
            if not field.startswith("_") and field not in UNTOLD and field not in plain and not isinstance(value, dict):
                found[f"{group}.{field}"] = value
    found["world_size"] = int(os.environ.get("WORLD_SIZE", "1"))
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found |= {f"version.{package}": version(package) for package in PACKAGES}
    return found | {f"slurm.{name}": os.environ[key] for name, key in SLURM.items() if key in os.environ}


def loggers_of(cfg: DictConfig) -> list[Logger]:
    """Return the loggers that `cfg.logger` names, one or many; they write nothing before `describe`.

    Raises InputError if one can't be made, such as where its package is not installed.
    """
    if not cfg.logger:
        return []
    nodes = [cfg.logger] if "_target_" in cfg.logger else [node for node in cfg.logger.values() if node]
    try:
        return [instantiate(node, _convert_="all") for node in nodes]
    except InstantiationException as error:
        raise InputError(f"logger: {str(error.__cause__ or error).splitlines()[0]}") from error


def describe(loggers: Sequence[Logger], cfg: DictConfig, job_type: str) -> None:
    """Give every logger the run's config, before anything is logged."""
    for logger in loggers:
        if isinstance(logger, WandB):
            logger.describe(cfg, job_type)
        else:
            logger.log_hyperparams(described(cfg))


def finish(loggers: Sequence[Logger], *files: Path) -> None:
    """End what the loggers record; a run of W&B keeps `files`."""
    for logger in loggers:
        if isinstance(logger, WandB):
            logger.finish(*files)
        else:
            logger.finalize("success")
