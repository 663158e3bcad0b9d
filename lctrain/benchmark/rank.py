"""One rank of a timed run: `python -m lctrain.benchmark.rank <config>` reads lengths from standard input, one per line.

The first rank writes each answer into the folder of the config.
"""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from lctrain.benchmark.measure import Measured, measure
from lctrain.benchmark.points import DOES_NOT_FIT
from lctrain.benchmark.trace import Exchanges
from lctrain.errors import DoesNotFit
from lctrain.folder import write_aside


def main() -> None:
    """Measure each length read until the input ends; on failure, print the reason as the last line."""
    settings = Path(sys.argv[1])
    cfg = OmegaConf.load(settings)
    assert isinstance(cfg, DictConfig)
    for line in sys.stdin:
        try:
            answer = _measured(cfg, int(line))
        except Exception as error:
            fits = not isinstance(error, torch.OutOfMemoryError | DoesNotFit)
            said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(said if fits else DOES_NOT_FIT, flush=True)
            os._exit(1)  # a normal exit would wait for ranks that wait for this one in an exchange
        if os.environ["RANK"] == "0":
            write_aside(settings.with_name(f"{int(line)}.json"), json.dumps(answer))


def _measured(cfg: DictConfig, length: int) -> dict[str, float]:
    """Time `cfg.num_steps` steps; with several devices, also trace one more step for the seconds spent in exchanges."""
    if os.environ["WORLD_SIZE"] == "1":
        return asdict(measure(cfg, length, num_steps=cfg.num_steps, budget=cfg.step_seconds))
    exchanges = Exchanges(step=1 + cfg.num_steps)
    measured: Measured = measure(cfg, length, num_steps=cfg.num_steps + 1, exchanges=exchanges)
    return asdict(replace(measured, seconds=measured.seconds[:-1])) | {"waiting": exchanges.waiting}


if __name__ == "__main__":
    main()
