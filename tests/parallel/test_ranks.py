"""What ranks do to each other: shards instead of whole models, and ends in bounded time."""

import re
import time

import pytest
import torch

from tests.parallel.ranks import on_cards

CARDS = [pytest.mark.multi_gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
MINUTES = {"cpu": 0.25, "gpu": 0.5}  # cards are shared by all of these runs
LONGEST = 240  # seconds, from the start of a run that does not end
SHORT = ["strategy=ddp", "trainer.max_steps=9", "evaluation=none"]


def sabotage(kind, **settings):
    where = f"+callbacks.{kind.lower()}"
    return [f"{where}._target_=sabotage.{kind}", *(f"{where}.{field}={value}" for field, value in settings.items())]


def on_rank_1(kind, **settings):
    """What goes wrong there in the fourth step."""
    return [*SHORT, *sabotage(kind, rank=1, step=3, **settings)]


FAULTS = {
    "dies": on_rank_1("Hurt", name="SIGKILL"),
    "freezes": on_rank_1("Hurt", name="SIGSTOP"),
    "stops-SIGUSR1": on_rank_1("Hurt", name="SIGUSR1"),
    "stops-SIGTERM": on_rank_1("Hurt", name="SIGTERM"),
    "hangs-ddp": on_rank_1("Sleep"),
    "hangs-zero3": [*on_rank_1("Sleep"), "strategy=zero3"],
    "waits": on_rank_1("Wait"),
    "clutches": on_rank_1("Clutch"),
    "fills": on_rank_1("Fill"),
}
DEVICE_INDEPENDENT = {"clutches"}  # one kind of device is enough
ON_CARDS_ALONE = {"stops-SIGTERM", "fills"}  # on CPUs SIGUSR1 does, and test_command_line


def everywhere(*faults):
    """Every fault on CPUs and, where there are two, on cards."""
    found = [pytest.param("cpu", fault, id=f"cpu-{fault}") for fault in faults if fault not in ON_CARDS_ALONE]
    cards = [fault for fault in faults if fault not in DEVICE_INDEPENDENT]
    found += [pytest.param("gpu", fault, id=f"gpu-{fault}", marks=CARDS) for fault in cards]
    return pytest.mark.parametrize(("device", "fault"), found)


@pytest.fixture(scope="module")
def begin(start):
    """Starts a run in which something goes wrong; on cards all of them together when one is asked for."""
    started = {}

    def run(device, fault):
        minutes = f"callbacks.watchdog.timeout_minutes={MINUTES[device]}"
        wanted = FAULTS.keys() - DEVICE_INDEPENDENT if device == "gpu" else {fault}
        for name in sorted(wanted - started.keys()) if device == "gpu" else wanted:
            words = [*FAULTS[name], minutes]
            ranks = start(2, {name: on_cards(words) if device == "gpu" else words})
            if device == "cpu":
                return ranks
            started[name] = ranks
        return started[fault]

    return run


def ended(ranks, seconds):
    """The ranks of a run that must end by itself, the last of them so long after the first."""
    ends = time.monotonic() + LONGEST
    try:
        while all(process.poll() is None for process in ranks.processes):
            assert time.monotonic() < ends, ranks.log(0)[-4000:] + ranks.log(1)[-4000:]
            time.sleep(0.1)
        first = time.monotonic()
        for process in ranks.processes:
            process.wait(seconds)
        assert time.monotonic() - first < seconds
    finally:
        ranks.kill()
    return ranks


def codes(ranks):
    return [process.returncode for process in ranks.processes]


def test_under_zero3_no_rank_ever_holds_the_model(train_on_ranks, saved):
    deep = saved("llama", max_position_embeddings=32, num_hidden_layers=12)
    sharded = [
        "strategy=zero3",
        f"model.path={deep}",
        "trainer.max_steps=1",
        "strategy.bucket_size=1000",
        *sabotage("Loading"),
    ]
    runs = train_on_ranks(4, {"full": sharded, "longlora": [*sharded, "tuning=longlora"]})
    for name in ("full", "longlora"):
        assert runs[name].exists()
    assert (runs.folder / "group-0/log-3.txt").read_text(errors="replace").count("loaded:") == 2


@everywhere("dies")
def test_a_rank_that_dies_is_named(begin, device, fault):
    """On cards no exchange tells: that its file and its process stand still does, before the timeout."""
    ranks = ended(begin(device, fault), 30)
    assert codes(ranks) == [1, -9], ranks.log(0)
    assert "error: rank 1 (" in ranks.log(0)
    assert re.search(r"in the forward after step 3 at sabotage.py:\d+, is gone; go on with resume=auto", ranks.log(0))


@everywhere("hangs-ddp", "hangs-zero3")
def test_a_rank_that_hangs_ends_the_run_and_is_named(begin, device, fault):
    ranks = ended(begin(device, fault), 30)
    logs = ranks.log(0) + ranks.log(1)
    assert codes(ranks) == [1, 1], logs
    assert logs.count(f"error: nothing moved for {MINUTES[device]} minutes: rank 1 (") == 1, logs
    assert "after step 3 at sabotage.py:" in logs
    assert "keeps the others waiting" in logs


@everywhere("waits")
def test_ranks_that_wait_for_each_other_are_named(begin, device, fault):
    ranks = ended(begin(device, fault), 30)
    logs = ranks.log(0) + ranks.log(1)
    assert codes(ranks) == [1, 1], logs
    assert logs.count(f"error: nothing moved for {MINUTES[device]} minutes: rank 0 (") == 1, logs
    assert re.search(r"; rank 1 \(.*after step 3 at sabotage.py:\d+: all wait for each other", logs), logs


@everywhere("clutches")
def test_a_rank_that_hangs_with_pythons_lock_ends_too(begin, device, fault):
    ranks = ended(begin(device, fault), 30)
    assert codes(ranks) == [1, 1]
    assert "nothing moved for 0.25 minutes: rank 1 (" in ranks.log(0)
    assert "is gone" in ranks.log(0)
    assert "sabotage.py" in ranks.log(1)  # the stacks of its threads


@everywhere("freezes")
def test_a_rank_that_is_frozen_ends_the_run(begin, device, fault):
    """Its own threads stand still too: the others tell."""
    ranks = begin(device, fault)
    try:
        assert ranks.processes[0].wait(LONGEST) == 1
        assert f"nothing moved for {MINUTES[device]} minutes: rank 1 (" in ranks.log(0)
        assert "is gone" in ranks.log(0)
    finally:
        ranks.kill()


@everywhere("fills")
def test_a_rank_that_runs_out_of_memory_tells_what_and_where(begin, device, fault):
    ranks = ended(begin(device, fault), 30)
    assert codes(ranks) == [1, 1], ranks.log(0) + ranks.log(1)
    where = r"error: rank 1 \(.*in the backward after step 3 at sabotage.py:\d+"
    assert re.search(where + r": CUDA out of memory. Tried to allocate 1[0-9.]+ .iB; memory=auto", ranks.log(1))
    assert re.search(where + ", failed: OutOfMemoryError: CUDA out of memory.*; go on with resume=auto", ranks.log(0))


@everywhere("stops-SIGUSR1", "stops-SIGTERM")
def test_a_signal_to_one_rank_stops_all_with_one_checkpoint(begin, device, fault):
    ranks = ended(begin(device, fault), 30)
    assert codes(ranks) == [75, 75], ranks.log(0) + ranks.log(1)
    signal = fault.partition("-")[2]
    assert "stopped by another rank after step 4; go on with resume=auto" in ranks.log(0)
    assert f"stopped by {signal} after step 4; go on with resume=auto" in ranks.log(1)
    assert [path.name for path in (ranks.folder / fault / "checkpoints").iterdir()] == ["step-00000004.ckpt"]
