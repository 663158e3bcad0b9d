"""One rank of a timed run: `python -m lctrain.benchmark.rank <config> <length>`; the first answers in JSON."""

import json
import os
import sys
from dataclasses import asdict

from omegaconf import DictConfig, OmegaConf

from lctrain.benchmark.measure import measure


def main() -> None:
    """Fails with a last line that says why."""
    cfg, length = OmegaConf.load(sys.argv[1]), int(sys.argv[2])
    assert isinstance(cfg, DictConfig)
    try:
        measured = measure(cfg, length, num_steps=cfg.num_steps, budget=cfg.step_seconds)
    except Exception as error:
        print(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", flush=True)
        os._exit(1)  # the others may wait for this one in an exchange, and it for them at its exit
    if os.environ["RANK"] == "0":
        print("RANK " + json.dumps(asdict(measured)), flush=True)


if __name__ == "__main__":
    main()
