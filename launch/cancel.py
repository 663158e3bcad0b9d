"""Cancel the job of a run. The job writes a checkpoint if Slurm leaves it the time, and is not queued again.

examples:
  lctrain cancel runs/demo
"""

from omegaconf import DictConfig

FIRST = "run_dir"  # the option that a bare first word sets
LOADS_MODELS = False


def run(cfg: DictConfig) -> None:
    from lctrain.cluster.cancel import main

    main(cfg)
