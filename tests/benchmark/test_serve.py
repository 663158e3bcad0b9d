"""Serving a tiny random model on a CPU; what is written, not how fast it is."""

import json
from types import SimpleNamespace

import pytest
import torch

from lctrain.benchmark import serve
from lctrain.benchmark.run import main
from lctrain.config import compose
from lctrain.errors import InputError

SMALL = [
    "serve.lengths=[96,48]", "serve.chunk_size=16", "serve.num_tokens=2", "serve.num_sink_tokens=2",
    "serve.recent_size=4", "serve.longest=false",
]  # fmt: skip


def run(folder, *overrides):
    main(compose("benchmark", ["what=serve", f"run_dir={folder}", *SMALL, *overrides]))
    return json.loads((folder / "serve.json").read_text())


def test_both_caches_are_measured_at_every_length(tmp_path):
    written = run(tmp_path)
    rows = written["rows"]
    assert [(row["cache"], row["length"]) for row in rows] == [("full", 48), ("duo", 48), ("full", 96), ("duo", 96)]
    assert all(row[name] > 0 for row in rows for name in ("prefill_seconds", "decode_seconds", "eager_seconds"))
    assert [ratio["length"] for ratio in written["ratios"]] == [48, 96]
    assert written["settings"]["chunk_size"] == 16
    # half of the heads keep 6 tokens of 96, with room for the 10 that are decoded
    assert written["ratios"][1]["kv_gib"] == pytest.approx((106 + 6) / (2 * 106))


def test_half_of_the_heads_is_a_field(tmp_path):
    ratio = run(tmp_path, "serve.lengths=[96]", "serve.streaming_share=1.0")["ratios"][0]
    assert ratio["kv_gib"] == pytest.approx(6 / 106)


def test_caches_filled_with_random_numbers_take_as_much(tmp_path):
    read, filled = (run(tmp_path / str(read), f"serve.read={read}") for read in (True, False))
    assert [row["kv_gib"] for row in filled["rows"]] == [row["kv_gib"] for row in read["rows"]]
    assert {row["filled"] for row in filled["rows"]} == {"random"}
    assert [sorted(ratio) for ratio in filled["ratios"]] == [
        ["decode_seconds", "eager_seconds", "kv_gib", "length"]
    ] * 2


def test_the_longest_is_shrunk_until_it_fits(monkeypatch):
    """Foretold from what shorter rows took, then tried."""
    monkeypatch.setattr(serve.torch.cuda, "mem_get_info", lambda: (10 * serve.GIB, 12 * serve.GIB))
    bench, tried = object.__new__(serve._Bench), []

    def filled(name, policy, length):
        tried.append(length)
        if length > 4.45 * serve.GIB:
            raise serve.torch.OutOfMemoryError
        return length

    bench.weights_gib, bench._model = 2.0, SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(bench, "_filled", filled, raising=False)
    monkeypatch.setattr(bench, "_num_bytes", lambda policy, length: 2 * length, raising=False)
    assert bench._longest("full", None, overhead=3.0) == tried[-1]
    assert tried == [int(4.5 * serve.GIB), int(int(4.5 * serve.GIB) * 0.99), tried[-1]]


def test_a_filled_cache_is_read_behind_and_decoded(tmp_path):
    cfg = compose("benchmark", ["what=serve", f"run_dir={tmp_path}", *SMALL])
    from transformers import AutoModelForCausalLM

    from lctrain.attention.full import FullAttention
    from lctrain.model.install import install

    model = AutoModelForCausalLM.from_pretrained(cfg.model.path)
    install(model, FullAttention())
    row = serve._Bench(cfg, model)._filled("full", serve.FullCache(), 70)
    assert (row.length, row.filled, row.prefill_seconds) == (70, "random", None)


def test_the_longest_needs_a_card(tmp_path):
    with pytest.raises(InputError, match=r"measured on a CUDA device; set serve\.longest=false"):
        run(tmp_path, "serve.longest=true")


def test_rows_that_a_ring_keeps_whole_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"keep 64 \+ 4 tokens, which is all of 48"):
        run(tmp_path, "serve.num_sink_tokens=64")
    assert not (tmp_path / "serve.json").exists()
