"""Weights & Biases: online with a key, else offline; never a reason for a run to stop."""

import logging
import secrets
from pathlib import Path
from typing import Literal

import wandb
from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)

INIT_TIMEOUT = 20  # seconds that a server may take to answer before the run goes on without it


def wandb_logger(
    *, project: str, entity: str | None, name: str | None, folder: str, mode: Literal["auto", "online", "offline"]
) -> WandbLogger:
    """Lightning's logger on a run whose id lives in `folder`, so that a resumed run goes on in the same W&B run.

    `mode=auto` is online where a key is configured. Where W&B can't be reached the run is recorded offline; the log
    says so, and how to sync it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    wandb.setup(wandb.Settings(silent=True))
    online = False
    try:
        online = mode == "online" or (mode == "auto" and wandb.login(prompt=False, verify=False))
        run = _start(project, entity, name, folder, "online" if online else "offline")
    except wandb.Error as error:
        log.warning("W&B can't be reached (%s); recording offline", str(error).splitlines()[0])
        wandb.teardown()  # else the id stays taken
        run, online = _start(project, entity, name, folder, "offline"), False
    log.info("W&B: %s", run.url if online else f"offline; upload with: wandb sync {Path(run.dir).parent}")
    return WandbLogger(experiment=run)


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
        # No metadata: it holds the command line, on which a key may stand. The commit is recorded without it.
        settings=wandb.Settings(init_timeout=INIT_TIMEOUT, silent=True, save_code=False, x_disable_meta=True),
    )


def _run_id(path: Path) -> str:
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
