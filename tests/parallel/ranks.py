"""Groups of processes that train as the ranks of one run, one case after the other; a case that fails fails alone."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import TCPStore

Cases = Mapping[str, Sequence[str]]
Troubles = dict[str, str | None]  # case → why it failed, None where it did not

ROOT, WORKER = Path(__file__).parents[2], Path(__file__).with_name("worker.py")
SECONDS = 900  # for all cases of a group
GRACE = 4  # seconds that the other ranks are left with, to say what they have to, when one has failed
ON_CARDS = ["trainer.accelerator=gpu", "kernel=sdpa", "layer_kernel=plain"]  # sums as they are on any number of cards


def on_cards(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of the same case on CUDA devices."""
    plain = [] if any(word.startswith("objective=") for word in overrides) else ["objective.loss=tiled"]
    return [*overrides, *ON_CARDS, *plain]


class Ranks:
    """Processes on this machine that train `cases`, with the variables that torchrun sets."""

    def __init__(self, folder: Path, num_ranks: int, cases: Cases) -> None:
        self.folder, self.cases = folder, cases
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cases.json").write_text(json.dumps(cases))
        self._store = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )  # no port is free until it is taken
        paths = [str(ROOT), str(WORKER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        shared = os.environ | {
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_RUN_ID": "tests",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        self.processes = []
        for rank in range(num_ranks):
            with self._log_file(rank).open("a") as log:
                command = [sys.executable, str(WORKER), str(folder / "cases.json")]
                environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))

    def finish(self, ends: float, stop: threading.Event) -> Troubles:
        """Wait for all until `ends`; return what is known of the cases, the one that a failed rank was in included."""
        failed: int | None = None
        while (codes := [process.poll() for process in self.processes]) != [0] * len(self.processes):
            if failed is None and any(codes):
                failed = next(rank for rank, code in enumerate(codes) if code)
                ends = min(ends, time.monotonic() + GRACE)
            if None not in codes or time.monotonic() > ends or stop.wait(0.1):
                self.kill()
                return self._troubles(failed or 0)
        return self._troubles(None)

    def kill(self) -> None:
        """End those that still run, and wait for all."""
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, rank: int, case: str | None = None) -> str:
        """Return what the rank printed, or its part of one case."""
        text = self._log_file(rank).read_text(errors="replace")
        return text if case is None else text.rpartition(f"case {case}\n")[2].partition("\ncase ")[0]

    def _log_file(self, rank: int) -> Path:
        return self.folder / f"log-{rank}.txt"

    def _troubles(self, failed: int | None) -> Troubles:
        """Return what the logs tell; where a rank failed, its case did, or the last one if it failed at its exit."""
        ranks = range(len(self.processes))
        if not all("\nready " in f"\n{self.log(rank)}" for rank in ranks):
            return {name: self._told(name) for name in self.cases}
        said = [{line.partition(" in ")[0] for line in self.log(rank).splitlines()} for rank in ranks]
        troubles: Troubles = {}
        for name in self.cases:
            if all(f"done {name}" in lines for lines in said):
                troubles[name] = None
            elif all(f"refused {name}" in lines for lines in said):
                troubles[name] = self._told(name)
            else:
                break
        else:
            name = next(reversed(self.cases))
        return troubles if failed is None else troubles | {name: self._told(name)}

    def _told(self, name: str) -> str:
        parts = (f"rank {rank}: {self.log(rank, name)[-4000:]}" for rank in range(len(self.processes)))
        return "\n".join([f"{name} failed", *parts])


class Runs:
    """The runs of cases, which `num_groups` groups of `num_ranks` processes train side by side."""

    def __init__(self, folder: Path, num_ranks: int, cases: Cases, num_groups: int, stop: threading.Event) -> None:
        self.folder, self._futures = folder, dict[str, Future[Troubles]]()
        pool, names = ThreadPoolExecutor(num_groups), list(cases)
        for i in range(num_groups):
            share = {name: cases[name] for name in names[i::num_groups]}
            future = pool.submit(self._train, folder / f"group-{i}", num_ranks, share, stop)
            self._futures |= dict.fromkeys(share, future)
        pool.shutdown(wait=False)

    def __getitem__(self, name: str) -> Path:
        """Return a case's run when its group has ended; fail with the case's own log if it failed."""
        if trouble := self._futures[name].result()[name]:
            pytest.fail(trouble, pytrace=False)
        return self.folder / name

    def troubles(self) -> Troubles:
        """Return why each case failed, None where it did not, when all have ended."""
        return {name: future.result()[name] for name, future in self._futures.items()}

    def _train(self, folder: Path, num_ranks: int, cases: Cases, stop: threading.Event) -> Troubles:
        """Train what is left in fresh processes whenever a rank has failed: no case is trained to its end twice."""
        troubles: Troubles = {}
        ends = time.monotonic() + SECONDS
        while left := {name: words for name, words in cases.items() if name not in troubles}:
            if time.monotonic() > ends or stop.is_set():
                return troubles | dict.fromkeys(left, f"not trained: its group ran for {SECONDS} s, see {folder}")
            for name in left:
                shutil.rmtree(self.folder / name, ignore_errors=True)  # of a rank that was ahead of one that failed
            troubles |= Ranks(folder, num_ranks, left).finish(ends, stop)
        return troubles
