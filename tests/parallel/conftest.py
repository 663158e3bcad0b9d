"""What tests of ranks begin with."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parallel.ranks import Cases, Ranks, Runs


@pytest.fixture(scope="session")
def tiny_run(saved: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides that every case begins with."""
    base, cache = saved("llama", max_position_embeddings=32), tmp_path_factory.getbasetemp() / "tokens"
    return f"""model.path={base} data=text data.path={text} datamodule.cache_dir={cache} logger=none
        datamodule.num_heldout_tokens=256 sequence_length=64 rope=linear trainer.accelerator=cpu trainer.max_steps=4
        optimizer.lr=1e-2 callbacks.checkpoint.every_num_minutes=null""".split()


@pytest.fixture(scope="session")
def complete(tiny_run: list[str]) -> Callable[[Path, int, Cases], dict[str, list[str]]]:
    """All overrides of cases whose runs lie in a folder."""
    return lambda folder, num_ranks, cases: {
        name: [*tiny_run, f"trainer.devices={num_ranks}", f"run_dir={folder / name}", *words]
        for name, words in cases.items()
    }


@pytest.fixture(scope="session")
def start(
    complete: Callable[[Path, int, Cases], Cases], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[int, Cases], Ranks]]:
    """Starts `num_ranks` processes that train every case one after the other."""
    started: list[Ranks] = []

    def begin(num_ranks: int, cases: Cases) -> Ranks:
        folder = tmp_path_factory.mktemp(f"{num_ranks}-ranks")
        started.append(Ranks(folder, num_ranks, complete(folder, num_ranks, cases)))
        return started[-1]

    yield begin
    for ranks in started:
        ranks.kill()


@pytest.fixture(scope="session")
def train_on_ranks(
    complete: Callable[[Path, int, Cases], Cases], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Runs]]:
    """Trains every case on `num_ranks` processes, in so many groups side by side; goes on while the caller does."""
    stop = threading.Event()

    def begin(num_ranks: int, cases: Cases, num_groups: int = 1) -> Runs:
        folder = tmp_path_factory.mktemp(f"{num_ranks}-ranks")
        return Runs(folder, num_ranks, complete(folder, num_ranks, cases), num_groups, stop)

    yield begin
    stop.set()
