"""One rank: trains the cases of a JSON file, name → overrides, one after the other. Exits as `lctrain train` would."""

import json
import sys
from pathlib import Path

import torch

from launch.exit_codes import exit_codes
from launch.quiet import quiet
from lctrain import config
from lctrain.training.run import train

torch.set_num_threads(1)
quiet()
for name, overrides in json.loads(Path(sys.argv[1]).read_text()).items():
    print(f"case {name}", flush=True)
    with exit_codes("train", overrides):
        train(config.compose("train", overrides))
