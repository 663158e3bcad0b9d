"""One rank: trains the cases of a JSON file one after the other, and says how each ended.

python worker.py cases.json      with the variables that torchrun sets; cases maps names to overrides
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from launch.quiet import quiet
from lctrain import config
from lctrain.errors import InputError, RunError
from lctrain.training.run import train


def main() -> None:
    torch.set_num_threads(1)
    quiet()
    path = Path(sys.argv[1])
    outcomes = {}
    for name, overrides in json.loads(path.read_text()).items():
        started = time.perf_counter()
        try:
            train(config.compose("train", overrides))
            outcomes[name] = "done"
        except (InputError, RunError) as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
        if os.environ["RANK"] == "0":
            print(f"{time.perf_counter() - started:6.2f} s  {name}: {outcomes[name]}", flush=True)
    path.with_name(f"outcomes-{os.environ['RANK']}.json").write_text(json.dumps(outcomes))


main()
