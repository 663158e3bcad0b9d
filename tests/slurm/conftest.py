"""A cluster for these tests alone, and small runs of the tiny base on its two nodes."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lctrain import config
from lctrain.cluster.slurm import job_states
from lctrain.cluster.submit import main as submit_main
from lctrain.export import export
from lctrain.folder import read_history, whole_checkpoints
from tests.slurm.cluster import Cluster, Unavailable, install, wait_for

NUM_STEPS, EVERY = 40, 10
RUN = f"""slurm.nodes=2 slurm.gpus_per_node=0 slurm.tasks_per_node=1 slurm.cpus_per_task=1 slurm.time=10
    trainer.accelerator=cpu trainer.max_steps={NUM_STEPS} trainer.val_check_interval=1000 sequence_length=64
    datamodule.num_heldout_tokens=256 curriculum=staged optimizer.lr=1e-4 logger=none
    callbacks.checkpoint.every_num_steps={EVERY} callbacks.checkpoint.every_num_minutes=null""".split()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Skips where Slurm can't be started."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("a cluster is started once on a machine: run pytest tests/slurm without -n")
    cluster = Cluster(Path(os.environ.get("SLURM_CI_DIR", "/tmp/slurm-lctrain")))
    try:
        install()
        cluster.start()
    except Unavailable as reason:
        cluster.stop()
        pytest.skip(f"no Slurm here: {reason}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "tests/slurm"), prepend=os.pathsep)
        yield cluster
    cluster.stop()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A submitted run, seen from outside."""

    folder: Path
    job_id: str
    cluster: Cluster

    @property
    def rows(self) -> list[dict[str, float]]:
        return read_history(self.folder / "metrics.jsonl")

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def state(self) -> str:
        found = job_states([self.job_id])
        return found[self.job_id].state if self.job_id in found else "UNKNOWN"

    @property
    def log(self) -> str:
        return (self.folder / f"slurm-{self.job_id}.log").read_text()

    @property
    def whole(self) -> list[str]:
        """The names of its whole checkpoints."""
        return [path.name for path in whole_checkpoints(self.folder / "checkpoints")]

    def reaches(self, step: int, seconds: float = 120) -> None:
        wait_for(lambda: self.step >= step, seconds, every=0.05, alive=lambda: True)

    def ends(self, state: str = "COMPLETED", seconds: float = 240) -> None:
        """Wait until the job is over, however often it comes back on the way."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        wait_for(lambda: self.state in over, seconds, every=0.5)
        assert self.state == state, self.log[-3000:]

    def comes_back(self, seconds: float = 180) -> tuple[int, float]:
        """How many steps the disaster of this moment costs, and the seconds until a step is trained again."""
        began, reached, restarts = time.monotonic(), 0, [row["restarts"] for row in self.rows][-1]

        def trains_again() -> bool:
            nonlocal reached
            rows = self.rows
            reached = max([reached, *(int(row["step"]) for row in rows if row["restarts"] <= restarts)])
            return bool(rows) and rows[-1]["restarts"] > restarts

        wait_for(trains_again, seconds, every=0.05)
        first = next(int(row["step"]) for row in self.rows if row["restarts"] > restarts)
        return reached + 1 - first, time.monotonic() - began

    def weights(self) -> bytes:
        """What `lctrain export` makes of the newest checkpoint."""
        return (export(str(self.folder), "auto", str(self.folder / "exported")) / "model.safetensors").read_bytes()

    def losses(self) -> list[tuple[float, ...]]:
        """Of every step what must not depend on what the cluster did."""
        return [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["sequence_length"]) for row in self.rows]


@pytest.fixture(scope="session")
def submit(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`lctrain submit` of a small run under overrides, in this process. What still runs at the end is cancelled."""

    def run(folder: Path | None = None, *overrides: str) -> Run:
        folder = folder or tmp_path_factory.mktemp("run") / "run"
        replaced = {word.partition("=")[0] for word in overrides}
        words = [word for word in RUN if word.partition("=")[0] not in replaced]
        cfg = config.compose("submit", [*words, *overrides, f"run_dir={folder}"])
        config.anchor_paths(cfg)
        config.check(cfg)
        submit_main(cfg)
        return Run(folder=folder, job_id=(folder / "job_id.txt").read_text().strip(), cluster=cluster)

    return run


@pytest.fixture(scope="session")
def undisturbed(submit: Callable[..., Run]) -> Run:
    """The run that nothing happens to."""
    run = submit()
    run.ends()
    assert run.step == NUM_STEPS
    return run


SEEN: list[tuple[str, Any, Any]] = []


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes what a disaster cost, for the table behind the tests."""
    return lambda steps, seconds: SEEN.append((request.node.name, steps, seconds))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The rows of docs/results/slurm.md."""
    if SEEN:
        terminalreporter.section("survived: steps lost, seconds until training again")
    for name, steps, seconds in SEEN:
        terminalreporter.line(f"{name:<60} {steps!s:>5} {seconds if seconds is None else round(seconds, 1)!s:>8}")
