"""Recall by the share of streaming heads, on a random model and with gates whose effect is known."""

import json
import os
import signal

import numpy as np
import pytest

from lctrain import config
from lctrain.benchmark.retrieval import retrieval
from lctrain.benchmark.retrieval_report import picture, row, table
from lctrain.errors import InputError, Stopped
from lctrain.evaluation.reader import Reader
from lctrain.heads import HeadPattern


@pytest.fixture
def benchmark(saved, text, tmp_path):
    """The config of a small comparison in `tmp_path/<name>`; every gate is 1."""
    path, gates = saved("llama", max_position_embeddings=128), tmp_path / "gates.json"
    HeadPattern.from_gates([[1.0, 1.0]] * 2, threshold=0.5, num_sink_tokens=2, recent_size=6).write_json(gates)
    words = f"""what=retrieval model.path={path} data=text data.path={text} datamodule.cache_dir={tmp_path}/tokens
        sequence_length=128 datamodule.heldout_fraction=0.5 evaluation=default evaluation.passkey.lengths=[64]
        evaluation.passkey.depths=[0.0,1.0] evaluation.passkey.num_trials=2 evaluation.perplexity.lengths=[32,64]
        evaluation.perplexity.num_tokens=256 retrieval.pattern={gates} retrieval.streaming_shares=[0.0,0.5]
        retrieval.num_seeds=2 trainer.accelerator=cpu"""
    return lambda name, *others: config.compose("benchmark", [f"run_dir={tmp_path}/{name}", *words.split(), *others])


def test_arms_are_what_they_say(benchmark, tmp_path):
    rows = {row["arm"]: row for row in retrieval(benchmark("run"))["arms"]}
    assert list(rows) == [
        *("full", "learned 0%", "learned 50%", "random 0% seed 0", "random 0% seed 1"),
        *("random 50% seed 0", "random 50% seed 1", "all streaming"),
    ]
    perplexity = {arm: row["perplexity"]["64"] for arm, row in rows.items()}
    for none_streams in ("learned 0%", "random 0% seed 0", "random 0% seed 1"):
        assert perplexity[none_streams] == pytest.approx(perplexity["full"], rel=1e-5)
        assert rows[none_streams]["recall"] == rows["full"]["recall"]
    some = {perplexity[arm] for arm in ("full", "learned 50%", "random 50% seed 0", "all streaming")}
    assert len(some) == 4
    pictures = {path.name for path in (tmp_path / "run").glob("*.png")}
    assert {"passkey_by_share.png", "passkey_full.png", "passkey_learned_50.png"} <= pictures


def test_a_stopped_comparison_goes_on_to_the_same_numbers(benchmark, tmp_path, monkeypatch):
    retrieval(benchmark("whole"))
    asked, complete = [], Reader.complete

    def stopping(self, prompts, num_tokens):
        asked.append(self.cache)
        if len(asked) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return complete(self, prompts, num_tokens)

    monkeypatch.setattr(Reader, "complete", stopping)
    with pytest.raises(Stopped):
        retrieval(benchmark("stopped"))
    with pytest.raises(InputError, match=r"retrieval.num_seeds was 2 when .* is 3 now"):
        retrieval(benchmark("stopped", "resume=auto", "retrieval.num_seeds=3"))
    retrieval(benchmark("stopped", "resume=auto"))
    whole, stopped = ((tmp_path / name / "retrieval.json").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped
    assert json.loads(whole)["arms"][0]["kept"] == {"passkey": None}  # the random model recalls nothing


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("retrieval.pattern=null", "needs model.path=… and retrieval.pattern=…"),
        ("evaluation=perplexity", "needs a task of recall"),
        ("retrieval.streaming_shares=[0.5,0.25]", "must ascend"),
        ("retrieval.num_seeds=0", "at least 1"),
        ("retrieval.recent_size=62", "streaming heads keep 2 . 62 tokens, which is all of 64"),
        (
            "attention@evaluation_attention=streaming evaluation_attention={num_sink_tokens:2,recent_size:16}",
            "DuoCache decides itself what heads see, instead of StreamingAttention",
        ),
    ],
)
def test_refusals_come_before_anything_is_written(benchmark, tmp_path, override, message):
    words = ["~evaluation.passkey"] if override == "evaluation=perplexity" else override.split()
    with pytest.raises(InputError, match=message):
        retrieval(benchmark("run", *words))
    assert not (tmp_path / "run").exists()


def result(share, perplexity):
    return {"passkey": {"by_length": {"64": share}, "by_depth": {}}, "perplexity": {"by_length": {"64": perplexity}}}


ROWS = [
    row("full", "full", 0.0, None, result(0.9, 5.0), result(0.9, 5.0)),
    row("learned 50%", "learned", 0.5, None, result(0.9, 5.5), result(0.9, 5.0)),
    *(row(f"random 50% seed {i}", "random", 0.5, i, result(0.3 * i, 6.0 + i), result(0.9, 5.0)) for i in range(3)),
    row("all streaming", "all streaming", 1.0, None, result(0.0, 7.0), result(0.9, 5.0)),
]


def test_the_table_has_a_line_per_kind_and_share():
    shown = table(ROWS)
    cells = {tuple(column.cells): column.header for column in shown.columns}
    assert cells[("90.0%", "90.0%", "30.0% (0.0% to 60.0%)", "0.0%")] == "passkey"
    assert cells[("5.00", "5.50", "7.00 (6.00 to 8.00)", "7.00")] == "perplexity at 64"
    assert ROWS[3]["kept"]["passkey"] == pytest.approx(1 / 3)


def test_the_picture_has_a_line_a_band_and_a_dot_per_seed():
    axes = picture("passkey", ROWS).axes[0]
    lines = {line.get_label(): [*map(list, line.get_data())] for line in axes.lines}
    assert lines["learned heads"] == [[0.0, 0.5, 1.0], [0.9, 0.9, 0.0]]
    assert lines["random heads, mean"] == [[0.0, 0.5, 1.0], [0.9, pytest.approx(0.3), 0.0]]
    assert lines["random heads, each seed"] == [pytest.approx([0.482, 0.5, 0.518]), [0.0, 0.3, 0.6]]
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (np.min(heights), np.max(heights)) == (0.0, 0.9)
