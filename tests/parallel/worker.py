"""One rank: trains the cases of a JSON file, name → overrides, one after the other. Exits as `lctrain train` would."""

import json
import os
import sys
import time
from pathlib import Path

import torch

from launch.exit_codes import exit_codes
from launch.quiet import quiet
from lctrain import config
from lctrain.parallel.cleanup import cleanup
from lctrain.training.run import train

REFUSED = 2
PATIENCE = 30.0  # seconds that ranks wait for the others to refuse a case, too


def main(cases: Path) -> None:
    """Tell of every case when it begins, and how it ended after how long; end where ranks differ."""
    torch.set_num_threads(1)
    quiet()
    print(f"ready after {time.process_time():.1f} s of computing", flush=True)
    for index, (name, overrides) in enumerate(json.loads(cases.read_text()).items()):
        print(f"case {name}", flush=True)
        started, outcome = time.perf_counter(), "done"
        try:
            with exit_codes("train", overrides):
                train(config.compose("train", overrides))
        except SystemExit as end:
            if end.code != REFUSED or not all_refuse(cases, index):
                raise
            outcome = "refused"
        print(f"{outcome} {name} in {time.perf_counter() - started:.1f} s", flush=True)


def all_refuse(cases: Path, index: int) -> bool:
    """Return whether all ranks refuse the case: before anything began then, and these processes can go on."""
    files = [cases.with_name(f"{cases.stat().st_mtime_ns}-{index}-{i}") for i in range(int(os.environ["WORLD_SIZE"]))]
    files[int(os.environ["RANK"])].touch()
    ends = time.monotonic() + PATIENCE
    while not all(file.exists() for file in files) and time.monotonic() < ends:
        time.sleep(0.05)
    return all(file.exists() for file in files)


if __name__ == "__main__":
    with cleanup():
        main(Path(sys.argv[1]))
