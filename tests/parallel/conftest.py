"""Groups of processes that train as the ranks of one run."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

Cases = Mapping[str, Sequence[str]]
WORKER = Path(__file__).with_name("worker.py")
SECONDS = 900  # for all cases of a group


@pytest.fixture(scope="session")
def tiny_run(saved: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides that every case begins with."""
    base, cache = saved("llama", max_position_embeddings=32), tmp_path_factory.getbasetemp() / "tokens"
    return f"""model.path={base} data=text data.path={text} datamodule.cache_dir={cache} logger=none
        datamodule.num_heldout_tokens=256 sequence_length=64 rope=linear trainer.accelerator=cpu trainer.max_steps=4
        optimizer.lr=1e-2 callbacks.checkpoint.every_num_minutes=null""".split()


@pytest.fixture(scope="session")
def start(tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Cases], "Ranks"]:
    """Starts `num_ranks` processes that train every case one after the other."""

    def begin(num_ranks: int, cases: Cases) -> Ranks:
        folder = tmp_path_factory.mktemp(f"{num_ranks}-ranks")
        shared = [*tiny_run, f"trainer.devices={num_ranks}"]
        complete = {name: [*shared, f"run_dir={folder / name}", *overrides] for name, overrides in cases.items()}
        return Ranks(folder, num_ranks, complete)

    return begin


@pytest.fixture(scope="session")
def train_on_ranks(start: Callable[[int, Cases], "Ranks"]) -> Callable[[int, Cases], Path]:
    """Trains every case on `num_ranks` processes; the folder that holds a run for each."""
    return lambda num_ranks, cases: start(num_ranks, cases).finish()


class Ranks:
    """Processes on this machine, with the variables that torchrun sets."""

    def __init__(self, folder: Path, num_ranks: int, cases: Cases) -> None:
        self.folder = folder
        (folder / "cases.json").write_text(json.dumps(cases))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = os.environ | {
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "tests",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(WORKER.parents[2]), str(WORKER.parent)]),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), str(folder / "cases.json")],
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=(folder / f"log-{rank}.txt").open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank in range(num_ranks)
        ]

    def finish(self) -> Path:
        """Waits for all; AssertionError with the log of the first that failed."""
        ends = time.monotonic() + SECONDS
        try:
            while (codes := [process.poll() for process in self.processes]) != [0] * len(self.processes):
                if failed := [rank for rank, code in enumerate(codes) if code]:
                    raise AssertionError(self.log(failed[0])[-4000:])
                assert time.monotonic() < ends, "too slow"
                time.sleep(0.1)
        finally:
            self.kill()
        return self.folder

    def kill(self) -> None:
        """Ends those who still wait for one that failed."""
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, rank: int) -> str:
        return (self.folder / f"log-{rank}.txt").read_text(errors="replace")
