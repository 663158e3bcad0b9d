"""Cancel the job of a run. It writes a checkpoint if Slurm leaves it the time, and does not come back.

examples:
  lctrain cancel runs/demo
"""

from omegaconf import DictConfig

FIRST = "run_dir"  # the option that a bare first word sets
LOADS_MODELS = False


def run(cfg: DictConfig) -> None:
    from lctrain.cluster.cancel import main

    main(cfg)
