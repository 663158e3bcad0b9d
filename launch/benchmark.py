"""Time lctrain against something plain, on this machine.

  overhead   tokens/s of `lctrain train` against a plain PyTorch loop on the same model, batch and attention

examples:
  lctrain benchmark overhead
  lctrain benchmark overhead run_dir=runs/overhead
"""

from omegaconf import DictConfig

FIRST = "what"  # the option that a bare first word sets


def run(cfg: DictConfig) -> None:
    from lctrain.benchmark.run import main

    main(cfg)
