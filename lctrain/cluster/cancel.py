"""Implement `lctrain cancel`."""

from pathlib import Path

from omegaconf import DictConfig

from lctrain.cluster.slurm import JOB_ID, call, job_states
from lctrain.errors import InputError


def main(cfg: DictConfig) -> None:
    """Cancel the job of `cfg.run_dir`. Raise InputError if no job of the folder waits or runs."""
    record = Path(cfg.run_dir) / JOB_ID
    if not record.exists():
        raise InputError(f"{cfg.run_dir} was not submitted: it has no {JOB_ID}")
    job_id = record.read_text().strip()
    states = job_states([job_id]).values()
    if states and not any(state.active for state in states):
        raise InputError(f"job {job_id} of {cfg.run_dir} has ended: {next(iter(states)).state}")
    call("scancel", job_id)
    print(f"job {job_id} of {cfg.run_dir} cancelled")
