"""Two processes train a tiny random model beside one; what they write, not how fast they are."""

import pytest

from lctrain.benchmark.devices import Ranks
from lctrain.benchmark.run import main
from lctrain.benchmark.step import choose
from lctrain.benchmark.trace import seconds_exchanging
from lctrain.config import compose
from lctrain.errors import InputError

SHAPE = "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, \
num_key_value_heads: 2}"


GOOD = {"num_rows": 1, "seconds": [1.0], "device_memory": 1.0, "waiting": 0.1}


def config(folder, *overrides):
    small = ["model=scratch", f"model.architecture={SHAPE}", "lengths=[64]", "num_steps=1", "trainer.accelerator=cpu"]
    return compose("benchmark", ["what=devices", f"run_dir={folder}", *small, *overrides])


def test_each_case_is_measured_up_to_what_does_not_fit(tmp_path, capsys, monkeypatch):
    asked = []

    def measure(ranks, length):
        cfg = ranks._cfg
        asked.append((cfg.trainer.devices, cfg.sequence_parallel_size, cfg.strategy.get("stage", 0), length))
        return {"seconds": [], "error": "out of memory"} if asked[-1] == (1, 1, 0, 128) else GOOD

    monkeypatch.setattr(Ranks, "measure", measure)
    cases = ["devices.cases=[full,full_zero3_shared,full_zero2_apart]", "lengths=[64,128,256]"]
    main(config(tmp_path, *cases))
    main(config(tmp_path, *cases))  # nothing is measured twice
    lengths = (64, 128, 256)
    assert asked == [(1, 1, 0, 64), (1, 1, 0, 128), *((2, 2, 3, n) for n in lengths), *((2, 1, 2, n) for n in lengths)]
    printed = capsys.readouterr().out
    assert "out of memory" in printed
    assert "10.0%" in printed


def test_ranks_share_a_row_of_a_sharded_model(tmp_path):
    cfg = choose(config(tmp_path, "trainer.devices=2", "sequence_parallel_size=2"), strategy="zero3")
    with Ranks(cfg, tmp_path) as ranks:
        rows = [ranks.measure(length) for length in (64, 32)]
    assert [(row["length"], row["num_rows"], len(row["seconds"])) for row in rows] == [(64, 1, 1), (32, 1, 1)]
    assert all(7 < row["loss"] < 9 for row in rows)  # nothing is learned yet: ln 4096 = 8.3


def test_a_rank_that_fails_says_why(tmp_path):
    with Ranks(config(tmp_path, "attention=shifted_sparse"), tmp_path) as ranks:
        row = ranks.measure(63)
    assert not row["seconds"]
    assert "a sequence of 63 tokens is not divisible" in row["error"]


class Event:
    """A kernel of a profile."""

    is_user_annotation = False

    def __init__(self, name, start, end):
        self.name, self.time_range = name, type("Range", (), {"start": start, "end": end})
        self.device_type = type("Device", (), {"name": "CUDA"})


def test_only_exchanges_without_computation_beside_them_count():
    kernels = [
        ("gemm", 0, 10),
        ("ncclDevKernel_SendRecv", 5, 14),
        ("norm", 12, 13),
        ("ncclDevKernel_AllGather", 20, 21),
    ]
    assert seconds_exchanging(Event(*kernel) for kernel in kernels) == pytest.approx(4e-6)


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="did you mean 'full_zero3_shared'"):
        main(config(tmp_path, "devices.cases=[full_zero3_share]"))
