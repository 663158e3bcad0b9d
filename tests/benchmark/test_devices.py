"""Two processes train a tiny random model beside one; what they write, not how fast they are."""

import pytest

from lctrain.benchmark import devices
from lctrain.benchmark.devices import _on_ranks
from lctrain.benchmark.run import main
from lctrain.benchmark.step import choose
from lctrain.config import compose
from lctrain.errors import InputError

SHAPE = "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, \
num_key_value_heads: 2}"


GOOD = {"num_rows": 1, "seconds": [1.0], "device_memory": 1.0}


def config(folder, *overrides):
    small = ["model=scratch", f"model.architecture={SHAPE}", "lengths=[64]", "num_steps=1", "trainer.accelerator=cpu"]
    return compose("benchmark", ["what=devices", f"run_dir={folder}", *small, *overrides])


def test_each_case_is_measured_against_one_device(tmp_path, capsys, monkeypatch):
    asked = []

    def on_ranks(cfg, length, folder):
        asked.append((cfg.trainer.devices, cfg.sequence_parallel_size, cfg.strategy.get("stage", 0), length))
        return {"seconds": [], "error": "no room"} if asked[-1] == (1, 1, 0, 128) else GOOD

    monkeypatch.setattr(devices, "_on_ranks", on_ranks)
    main(config(tmp_path, "devices.cases=[full_shared,full_apart]", "lengths=[64,128,256]"))
    alone, shared, apart = [(1, 1, 0, n) for n in (64, 128)], [(2, 2, 3, n) for n in (64, 128, 256)], (2, 1, 3)
    assert asked == alone + shared + [(*apart, n) for n in (64, 128, 256)]  # one device is measured once
    assert "no room" in capsys.readouterr().out


def test_ranks_share_a_row_of_a_sharded_model(tmp_path):
    cfg = choose(config(tmp_path, "trainer.devices=2", "sequence_parallel_size=2"), strategy="zero3")
    row = _on_ranks(cfg, 64, tmp_path)
    assert (row["length"], row["num_rows"], len(row["seconds"])) == (64, 1, 1)
    assert 7 < row["loss"] < 9  # nothing is learned yet: ln 4096 = 8.3


def test_a_rank_that_fails_says_why(tmp_path):
    row = _on_ranks(config(tmp_path, "attention=shifted_sparse"), 63, tmp_path)
    assert not row["seconds"]
    assert "a sequence of 63 tokens is not divisible" in row["error"]


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="did you mean 'full_shared'"):
        main(config(tmp_path, "devices.cases=[full_share]"))
