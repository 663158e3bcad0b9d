"""Log to Weights & Biases, online with a key and offline otherwise; a failure of W&B never stops a run."""

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lctrain.folder import is_first_process, read_history

log = logging.getLogger(__name__)

INIT_TIMEOUT = 20  # seconds that a server may take to answer before the run goes on without it

SLURM = {"job_id": "SLURM_JOB_ID", "nodes": "SLURM_JOB_NODELIST", "restarts": "SLURM_RESTART_COUNT"}


class StepLogger(WandbLogger):
    """Lightning's W&B logger with optimizer steps as W&B's own step axis.

    Otherwise W&B counts calls, and a run that is continued offline would count from 0 again. A step that is logged
    twice has the same values to the bit; a server keeps the first.
    """

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        try:
            self.experiment.log({**metrics, "trainer/global_step": step}, step=step)
        except Exception as error:  # metrics.jsonl has the step, so the run goes on whatever fails in W&B
            log.warning("W&B did not take step %s (%s)", step, type(error).__name__)


def wandb_logger(
    *, project: str, entity: str | None, name: str | None, folder: str, mode: Literal["auto", "online", "offline"]
) -> WandbLogger:
    """Return a logger for a W&B run whose id is stored in `folder`, so that a resumed run continues the same W&B run.

    `mode=auto` is online if a key is configured and WANDB_MODE does not forbid it. If W&B can't be reached, the run is
    recorded offline, and the log says so and how to sync it. Only the first rank talks to W&B.
    """
    if not is_first_process():
        return StepLogger()
    Path(folder).mkdir(parents=True, exist_ok=True)
    wandb.setup(wandb.Settings(silent=True))
    online = False
    try:
        may_go_online = os.environ.get("WANDB_MODE", "online") == "online"
        online = mode == "online" or (mode == "auto" and may_go_online and wandb.login(prompt=False, verify=False))
        run = _start(project, entity, name, folder, "online" if online else "offline")
    except wandb.Error as error:
        log.warning("W&B can't be reached (%s); recording offline", str(error).splitlines()[0])
        wandb.teardown()  # otherwise the run's id stays taken
        run, online = _start(project, entity, name, folder, "offline"), False
    log.info("W&B: %s", run.url if online else f"offline; upload with: wandb sync {Path(run.dir).parent}")
    if job := {name: os.environ[variable] for name, variable in SLURM.items() if variable in os.environ}:
        run.config.update({"slurm": job}, allow_val_change=True)  # type: ignore[no-untyped-call]
    logger = StepLogger(experiment=run)
    if not online:  # W&B's process may have ended before it wrote all to disk: log again what metrics.jsonl holds
        for row in read_history(Path(folder) / "metrics.jsonl"):
            logger.log_metrics({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))
    return logger


def _start(
    project: str, entity: str | None, name: str | None, folder: str, mode: Literal["online", "offline"]
) -> wandb.Run:
    return wandb.init(
        project=project,
        entity=entity,
        name=name,
        dir=folder,
        id=_run_id(Path(folder) / "wandb_id.txt"),
        resume="allow" if mode == "online" else None,
        mode=mode,
        # No metadata: it holds the command line, which may contain a key. The commit is recorded without it.
        settings=wandb.Settings(init_timeout=INIT_TIMEOUT, silent=True, save_code=False, x_disable_meta=True),
    )


def _run_id(path: Path) -> str:
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
