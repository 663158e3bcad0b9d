"""Several devices as a user asks for them: `lctrain train … trainer.devices=2`, which starts the other rank itself."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lctrain.folder import read_history
from tests.parallel.ranks import ROOT, on_cards

CARDS = [pytest.mark.multi_gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
SECONDS = 240
OFFLOAD = ["strategy=zero3", "strategy.offload_optimizer=true", "strategy.offload_parameters=true"]
STRATEGIES = {name: [f"strategy={name}"] for name in ("ddp", "zero1", "zero2", "zero3")} | {"zero3-offload": OFFLOAD}
HALF = ["strategy=zero3", "strategy.half_precision=true", "tuning=full", "model.dtype=bfloat16"]
MATRIX = {
    f"{name}-sp{sp}": [*words, f"sequence_parallel_size={sp}"] for name, words in STRATEGIES.items() for sp in (1, 2)
} | {"zero3-half-sp2": [*HALF, "sequence_parallel_size=2"]}
FAILS = [
    *("strategy=ddp", "trainer.max_steps=9", "callbacks.watchdog.timeout_minutes=0.25"),
    *("+callbacks.fill._target_=sabotage.Fill", "+callbacks.fill.rank=1", "+callbacks.fill.step=3"),
]


class CommandLine:
    """`lctrain train <overrides>` in an empty folder, and what it printed when it has ended."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        environment = {
            k: v for k, v in os.environ.items() if k not in ("MASTER_PORT", "LOCAL_RANK")
        }  # chosen by Lightning
        paths = [str(ROOT), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._log = (folder / "log.txt").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch", "train", f"run_dir={folder / 'run'}", *overrides],
            cwd=folder,
            env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def finish(self) -> tuple[int, str]:
        """Return the exit code and all that was printed; end what its processes leave running."""
        try:
            code = self._process.wait(SECONDS)
        finally:
            self.kill()
        return code, (self.folder / "log.txt").read_text(errors="replace")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def command_line(tiny_run, tmp_path_factory):
    started = []

    def start(overrides):
        words = [*tiny_run, "trainer.devices=2", *overrides]
        started.append(CommandLine(tmp_path_factory.mktemp("command-line") / "here", words))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_the_process_that_started_the_others_survives_them_to_say_what_happened(command_line):
    tells_of_memory(*command_line(FAILS).finish())


def tells_of_memory(code, printed):
    """Each rank by a line of its own."""
    assert code == 1, printed
    where = r"error: rank 1 \(.*in the backward after step 3 at sabotage.py:\d+"
    assert re.search(where + r": CUDA out of memory. Tried to allocate 1.00 GiB; memory=auto", printed), printed
    assert re.search(where + r", failed: OutOfMemoryError: CUDA out of memory.*; go on with resume=auto", printed), (
        printed
    )


@pytest.fixture(scope="module")
def on_two_cards(command_line):
    """All of the matrix, side by side."""
    two_steps = ["trainer.max_steps=2", "datamodule.micro_batch_size=2", "scheduler.num_warmup_steps=1"]
    cases = {"single": ["strategy=single"], "fails": [*FAILS, "callbacks.watchdog.timeout_minutes=0.5"]} | MATRIX
    return {name: command_line(on_cards([*two_steps, *words])) for name, words in cases.items()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=CARDS) for name in MATRIX])
def test_every_strategy_takes_two_steps_on_two_cards(on_two_cards, name):
    code, printed = on_two_cards[name].finish()
    assert code == 0, printed[-4000:]
    rows = read_history(on_two_cards[name].folder / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert "2 steps done" in printed


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_cards_are_too_many_for_one_process(on_two_cards):
    code, printed = on_two_cards["single"].finish()
    assert code == 2, printed
    assert "strategy=single is for one device, trainer.devices gives 2; use ddp or zero1" in printed


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_cards_too_it_survives_them(on_two_cards):
    tells_of_memory(*on_two_cards["fails"].finish())
