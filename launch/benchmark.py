"""Time lctrain against something plain, on this machine.

  overhead   tokens/s of `lctrain train` against a plain PyTorch loop on the same model, batch and attention

Prints a table and writes overhead.json into run_dir. Takes every group and option of `lctrain train`.

examples:
  lctrain benchmark overhead
  lctrain benchmark overhead run_dir=runs/overhead num_steps=50 num_repeats=5 sequence_length=2048
  lctrain benchmark overhead model.path=<folder or hub id>
"""

from omegaconf import DictConfig

FIRST = "what"  # the option that a bare first word sets


def run(cfg: DictConfig) -> None:
    from lctrain.benchmark.run import main

    main(cfg)
