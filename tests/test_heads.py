"""A head pattern survives every file it can be in, decides exactly as many heads as asked, and refuses what is none."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from lctrain.errors import InputError
from lctrain.heads import JSON, TSV, HeadPattern, architecture

GATES = [[1.0, 0.25, 0.75], [0.0, 0.5, 0.875]]
PATTERN = HeadPattern.from_gates(GATES, threshold=0.5, num_sink_tokens=4, recent_size=8, provenance={"run": "a run"})


def llama(**changes: int) -> LlamaConfig:
    return LlamaConfig(
        **{"num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 6, "num_key_value_heads": 3, **changes}
    )


def test_a_head_retrieves_above_the_threshold() -> None:
    assert PATTERN.retrieval_heads.tolist() == [[True, False, True], [False, False, True]]


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 2 / 3, 1])
@pytest.mark.parametrize("gates", [torch.ones(4, 6), torch.zeros(4, 6), torch.rand(4, 6)])
def test_a_share_of_heads_streams_exactly_and_those_with_the_smallest_gates(gates: torch.Tensor, share: float) -> None:
    retrieves = HeadPattern.from_gates(gates, streaming_share=share).retrieval_heads
    assert (~retrieves).sum() == round(share * 24)
    if 0 < share < 1:
        assert gates[retrieves].min() >= gates[~retrieves].max()


def test_equal_gates_are_told_apart_all_over_the_model_and_always_alike() -> None:
    first, again = (HeadPattern.from_gates(torch.ones(8, 8), streaming_share=0.5).retrieval_heads for _ in range(2))
    assert first.equal(again)
    assert len(set(first.sum(1).tolist())) > 1  # not layer by layer, nor alternating
    assert 0 < first[:4].sum() < 32


@pytest.mark.parametrize("name", ["", JSON])
def test_json_gives_everything_back(tmp_path: Path, name: str) -> None:
    PATTERN.write_json(tmp_path / JSON)
    assert HeadPattern.read(tmp_path / name) == PATTERN


def test_a_tsv_gives_the_gates_back(tmp_path: Path) -> None:
    PATTERN.write_tsv(tmp_path / TSV)
    read = HeadPattern.read(tmp_path)
    assert (read.gates, read.threshold) == (PATTERN.gates, 0.5)
    assert (read.num_sink_tokens, read.recent_size) == (64, 256)


def test_a_model_of_one_layer_or_of_one_head_keeps_its_shape(tmp_path: Path) -> None:
    for gates in ([[0.5, 1.0]], [[0.5], [1.0]]):
        HeadPattern.from_gates(gates, threshold=0.5).write_tsv(tmp_path / TSV)
        assert HeadPattern.read(tmp_path).gates == tuple(map(tuple, gates))


def test_the_authors_folder_loads(tmp_path: Path) -> None:
    """Their gates overshoot by an optimizer step, and their config.json names the model and what was trained with."""
    np.savetxt(tmp_path / TSV, [[-1.2e-4, 1.0], [0.34, 1.005]], delimiter="\t")
    settings = {"model_name": "models/M", "sink_size": 128, "recent_size": 256, "deploy_sink_size": None}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    read = HeadPattern.read(tmp_path)
    assert read.gates == ((0.0, 1.0), (0.34, 1.0))
    assert (read.num_sink_tokens, read.recent_size, read.provenance) == (64, 256, {"model": "models/M"})
    (tmp_path / "config.json").write_text(json.dumps({**settings, "deploy_sink_size": 16, "deploy_recent_size": 32}))
    read = HeadPattern.read(tmp_path)
    assert (read.num_sink_tokens, read.recent_size) == (16, 32)


def test_reading_may_decide_anew(tmp_path: Path) -> None:
    PATTERN.write_json(tmp_path / JSON)
    assert HeadPattern.read(tmp_path, streaming_share=0.5).retrieval_heads.sum() == 3
    assert HeadPattern.read(tmp_path, threshold=0.8).retrieval_heads.sum() == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\tnan\n0\t1\n", "layer 0, head 1 is nan"),
        ("1\t0\n0\t7\n", "layer 1, head 1 is 7"),
        ("1\t0\n0\n", "no head pattern"),
        ("one\ttwo\n", "no head pattern"),
        ("", "needs the same number"),
        ("\n \n", "needs the same number"),
    ],
)
def test_what_is_no_pattern_is_refused_by_its_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / TSV).write_text(text)
    with pytest.raises(InputError, match=message) as refused:
        HeadPattern.read(tmp_path)
    assert TSV in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_json_of_something_else_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    for content in ('{"gates": [[1]], "colour": "red"}', "{}", "[1]", "null"):
        (tmp_path / JSON).write_text(content)
        with pytest.raises(InputError, match=f"{JSON}: a head pattern has gates, and nothing but gates, threshold, "):
            HeadPattern.read(tmp_path)
    (tmp_path / JSON).write_text("not json")
    with pytest.raises(InputError, match=f"{JSON} is no head pattern"):
        HeadPattern.read(tmp_path)
    with pytest.raises(InputError, match="is no head pattern"):
        HeadPattern.read(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": None}, "one of"),
        ({"streaming_share": 0.5}, "one of"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"recent_size": 0}, "recent_size=0"),
        ({"num_sink_tokens": 4.5}, "num_sink_tokens=4.5 must be a whole number"),
        ({"recent_size": "8"}, "recent_size=8"),
        ({"gates": ((1.0,), (1.0, 0.0))}, "same number"),
    ],
)
def test_settings_without_meaning_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PATTERN, **changes)


def test_a_pattern_of_another_shape_or_for_another_model_is_refused() -> None:
    PATTERN.check(llama(), length=16)
    with pytest.raises(InputError, match="2 layers of 3 key-value heads, the model 4 of 3"):
        PATTERN.check(llama(num_hidden_layers=4))
    mine = dataclasses.replace(PATTERN, provenance={"architecture": architecture(llama())})
    mine.check(llama())
    with pytest.raises(InputError, match="of another model"):
        mine.check(llama(vocab_size=7))
    with pytest.raises(InputError, match="all of 12"):
        PATTERN.check(llama(), length=12)
