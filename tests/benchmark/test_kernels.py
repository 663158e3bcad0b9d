import pytest
import torch

from lctrain.attention.longformer import Longformer
from lctrain.benchmark import kernels
from lctrain.benchmark.kernels import PATTERNS, Heads, count_pairs, packed_documents, row_mask
from lctrain.config import compose
from lctrain.errors import InputError

HEADS = Heads(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
METHODS = PATTERNS | {"longformer": Longformer(sliding_window=100, num_global_tokens=5, dilation=3)}


@pytest.mark.parametrize("documents", [[1000], [300, 1, 699]], ids=["alone", "packed"])
@pytest.mark.parametrize("name", METHODS)
def test_pairs_are_those_that_attend(name, documents):
    mask = row_mask(METHODS[name], 1000, HEADS, documents, "cpu")
    assert count_pairs(mask) == mask.evaluate(slice(0, 1000), slice(0, 1000)).sum() / mask.num_heads


def test_positions_restart_in_every_document():
    mask = row_mask(METHODS["full"], 9, HEADS, [4, 5], "cpu")
    assert mask.positions[0].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert mask.documents[1].tolist() == [[0] * 4 + [1] * 5]


def test_packed_documents_fill_the_row_and_fit_no_block():
    sizes = packed_documents(16384)
    assert sum(sizes) == 16384
    assert all(size % 128 for size in sizes)


def test_needs_a_card(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = compose("benchmark", ["what=kernels", f"run_dir={tmp_path}"])
    with pytest.raises(InputError, match="benchmark kernels needs a CUDA device"):
        kernels.kernels(cfg)


def test_backends_are_timed_side_by_side(monkeypatch, tmp_path, capsys):
    """Each against its own rate in full attention."""

    def case(name, kernel, pattern, packed, length, *_):
        rate = {"flash": 600.0, "varlen": 300.0}[name] * (0.5 if pattern == "streaming" else 1.0)
        return kernels.Result(
            kernel=name, pattern=pattern, packed=packed, length=length, pairs_per_head=1.0, mask_seconds=0.0,
            mask_bytes=0, forward_seconds=1.0, seconds=3.0, tflops_per_second=rate,
        )  # fmt: skip

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(kernels, "choose", lambda name, demand: (name, None))
    monkeypatch.setattr(kernels, "_case", case)
    options = ["kernels.backends=[flash,varlen]", "kernels.lengths=[1024]", "kernels.patterns=[full,streaming]"]
    rows = kernels.kernels(compose("benchmark", ["what=kernels", f"run_dir={tmp_path}", *options]))
    found = [(row.kernel, row.of_full) for row in rows if not row.packed]
    assert found == [("flash", 1.0), ("varlen", 1.0), ("flash", 0.5), ("varlen", 0.5)]
    assert "varlen" in capsys.readouterr().out
