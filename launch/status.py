"""Show one run, or all runs of a folder: state, step, loss, tokens/s, time left, restarts.

Reads each run's own metrics and, where Slurm is installed, squeue and sacct.

examples:
  lctrain status
  lctrain status runs/demo
  lctrain status folder=/scratch/me/runs
"""

from omegaconf import DictConfig

FIRST = "run_dir"  # the option that a bare first word sets
LOADS_MODELS = False


def run(cfg: DictConfig) -> None:
    from lctrain.cluster.status import main

    main(cfg)
