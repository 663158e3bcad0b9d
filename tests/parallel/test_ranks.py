"""What ranks do to each other: shards instead of whole models, and ends in bounded time."""

import re
import time

import pytest

SHORT = ["strategy=ddp", "callbacks.watchdog.timeout_minutes=0.25", "trainer.max_steps=9", "evaluation=none"]


def sabotage(kind, **settings):
    where = f"+callbacks.{kind.lower()}"
    return [f"{where}._target_=sabotage.{kind}", *(f"{where}.{field}={value}" for field, value in settings.items())]


def test_under_zero3_no_rank_ever_holds_the_model(train_on_ranks, saved):
    deep = saved("llama", max_position_embeddings=32, num_hidden_layers=12)
    sharded = [
        "strategy=zero3",
        f"model.path={deep}",
        "trainer.max_steps=1",
        "strategy.bucket_size=1000",
        *sabotage("Loading"),
    ]
    folder = train_on_ranks(4, {"full": sharded, "longlora": [*sharded, "tuning=longlora"]})
    assert (folder / "log-3.txt").read_text(errors="replace").count("loaded:") == 2


def ended(start, cases, seconds):
    """The processes of a run that must end by itself, and how long it took from the first to the last of them."""
    ranks = start(2, cases)
    try:
        while all(process.poll() is None for process in ranks.processes):
            time.sleep(0.1)
        first = time.monotonic()
        for process in ranks.processes:
            process.wait(seconds)
        assert time.monotonic() - first < seconds
    finally:
        ranks.kill()
    return ranks


def test_a_rank_that_dies_is_named(start):
    ranks = ended(start, {"dies": [*SHORT, *sabotage("Hurt", rank=1, step=3, name="SIGKILL")]}, 30)
    assert [process.returncode for process in ranks.processes] == [1, -9]
    assert "error: rank 1 (" in ranks.log(0)
    assert re.search(r"in the forward after step 3 at sabotage.py:\d+, is gone; go on with resume=auto", ranks.log(0))


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_rank_that_hangs_ends_the_run_and_is_named(start, strategy):
    hang = [*SHORT, f"strategy={strategy}", *sabotage("Sleep", rank=1, step=3)]
    ranks = ended(start, {"hangs": hang}, 30)
    assert [process.returncode for process in ranks.processes] == [1, 1]
    logs = ranks.log(0) + ranks.log(1)
    assert logs.count("error: nothing moved for 0.25 minutes: rank 1 (") == 1
    assert "after step 3 at sabotage.py:" in logs
    assert "keeps the others waiting" in logs


def test_a_rank_that_is_frozen_ends_the_run(start):
    """Its own threads stand still too: the others tell."""
    ranks = start(2, {"freezes": [*SHORT, *sabotage("Hurt", rank=1, step=3, name="SIGSTOP")]})
    try:
        assert ranks.processes[0].wait(90) == 1
        assert "nothing moved for 0.25 minutes: rank 1 (" in ranks.log(0)
        assert "is gone" in ranks.log(0)
    finally:
        ranks.kill()


def test_a_signal_to_one_rank_stops_all_with_one_checkpoint(start):
    ranks = ended(start, {"stops": [*SHORT, *sabotage("Hurt", rank=1, step=3, name="SIGUSR1")]}, 30)
    assert len({process.returncode for process in ranks.processes}) == 1
    assert "stopped by another rank after step 4; go on with resume=auto" in ranks.log(0)
    assert "stopped by SIGUSR1 after step 4; go on with resume=auto" in ranks.log(1)
    assert [path.name for path in (ranks.folder / "stops/checkpoints").iterdir()] == ["step-00000004.ckpt"]
