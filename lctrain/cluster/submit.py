"""Implement `lctrain submit`: check the run, snapshot its code and config, and queue it."""

import shutil
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lctrain import config
from lctrain.cluster.check import check_evaluation, check_training
from lctrain.cluster.job import Job
from lctrain.cluster.script import job_script
from lctrain.cluster.slurm import JOB_ID, call, job_states
from lctrain.errors import InputError
from lctrain.folder import RunFolder
from lctrain.plan import run as plan

OWN = ("slurm", "dry_run", "rows_per_step", *plan.OPTIONS)  # options of submit, not of the run


def main(cfg: DictConfig) -> None:
    """Queue the run, or print its script. Raise InputError before anything is written or queued."""
    job: Job = instantiate(cfg.slurm, _convert_="all")
    run_dir = Path(cfg.run_dir)
    script = job_script(job, run_dir, [f"--config-dir={run_dir}", "--config-name=job"])
    if cfg.dry_run:
        print(script, end="")
        return
    _check_folder(run_dir, cfg.get("resume", "never"))
    for line in (check_evaluation if job.evaluates else check_training)(cfg, job):
        print(line)
    call("sbatch", "--test-only", given=script)
    _snapshot(cfg, run_dir)
    (run_dir / "job.sbatch").write_text(script)
    job_id = call("sbatch", "--parsable", str(run_dir / "job.sbatch")).strip().partition(";")[0]
    (run_dir / JOB_ID).write_text(f"{job_id}\n")
    log = str(job.log(run_dir)).replace("%j", job_id).replace("%A", job_id).replace("%a", "<seed>")
    told = {"job": job_id, "folder": run_dir, "log": log, "W&B": _wandb(cfg, job)}
    print(*(f"{name:<8}{value}" for name, value in told.items()), sep="\n")


def _check_folder(run_dir: Path, resume: str) -> None:
    """Raise InputError if the folder holds a run that `resume` does not continue, or a job that waits or runs."""
    if (run_dir / JOB_ID).exists():
        job_id = (run_dir / JOB_ID).read_text().strip()
        if active := [state for state in job_states([job_id]).values() if state.active]:
            raise InputError(
                f"job {job_id} of {run_dir} is {active[0].state}; cancel it first, or choose another run_dir"
            )
    RunFolder(run_dir).resume_from(resume)


def _snapshot(cfg: DictConfig, run_dir: Path) -> None:
    """Copy the code and the config into run_dir, so that later edits do not change what the job runs."""
    code, source = run_dir / "code", Path(config.__file__).parents[1]
    shutil.rmtree(code, ignore_errors=True)
    for name in ("lctrain", "launch", "conf"):  # in a wheel conf lies in lctrain
        if (source / name).is_dir():
            shutil.copytree(source / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    # Interpolations are kept: with slurm.array, each task has its own seed and folder.
    composed = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in OWN])
    if "trainer" in cfg:
        composed.trainer.update(devices=cfg.trainer.devices, num_nodes=cfg.trainer.num_nodes)
        composed.resume = "auto"
    head = "# What the job composes, with --config-dir=<this folder> --config-name=job\n"
    defaults = "defaults:\n  - hydra: default\n  - _self_\n\n"
    (run_dir / "job.yaml").write_text(head + defaults + OmegaConf.to_yaml(composed))
    (run_dir / "config.yaml").write_text(config.dump(composed))  # the job refuses to start if its config differs


def _wandb(cfg: DictConfig, job: Job) -> str:
    if not cfg.logger or "wandb" not in cfg.logger._target_:
        return "not used (logger=wandb)"
    if job.offline or cfg.logger.mode == "offline":
        return f"offline; upload with: wandb sync {cfg.run_dir}/wandb/offline-run-*"
    return (
        f"https://wandb.ai/{cfg.logger.entity or '<you>'}/{cfg.logger.project}, run {cfg.logger.name or '<its name>'}"
    )
