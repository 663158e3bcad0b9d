"""One rank of a timed run: `python -m lctrain.benchmark.rank <config> <length>`; the first answers in JSON."""

import json
import os
import sys
from dataclasses import asdict

import torch
from omegaconf import DictConfig, OmegaConf

from lctrain.benchmark.measure import measure
from lctrain.benchmark.points import DOES_NOT_FIT
from lctrain.errors import DoesNotFit


def main() -> None:
    """Fails with a last line that says why."""
    cfg, length = OmegaConf.load(sys.argv[1]), int(sys.argv[2])
    assert isinstance(cfg, DictConfig)
    try:
        measured = measure(cfg, length, num_steps=cfg.num_steps, budget=cfg.step_seconds)
    except Exception as error:
        fits = not isinstance(error, torch.OutOfMemoryError | DoesNotFit)
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(said if fits else DOES_NOT_FIT, flush=True)
        os._exit(1)  # the others may wait for this one in an exchange, and it for them at its exit
    if os.environ["RANK"] == "0":
        print("RANK " + json.dumps(asdict(measured)), flush=True)


if __name__ == "__main__":
    main()
