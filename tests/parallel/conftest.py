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


def start_ranks(folder: Path, num_ranks: int, cases: Cases, num_nodes: int = 1) -> list[dict[str, str]]:
    """Trains every case on `num_ranks` processes of this machine; each rank's outcomes, by case."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "GROUP_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(WORKER.parents[2]), str(WORKER.parent)]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder / "cases.json")],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks)},
            stdout=(folder / f"log-{rank}.txt").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(num_ranks)
    ]
    try:
        while any(rank.poll() is None for rank in ranks):
            if failed := [i for i, rank in enumerate(ranks) if rank.poll()]:
                raise AssertionError((folder / f"log-{failed[0]}.txt").read_text()[-3000:])
            time.sleep(0.1)
    finally:
        for rank in ranks:  # those who still wait for one that failed
            rank.kill()
            rank.wait()
    return [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[[int, Cases], list[dict[str, str]]]:
    """`start_ranks` in a folder of the test."""
    return lambda num_ranks, cases: start_ranks(tmp_path / f"{num_ranks}-ranks", num_ranks, cases)
