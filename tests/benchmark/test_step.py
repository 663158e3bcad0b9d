"""Steps, lengths and traces of a tiny random model on a CPU; what they write, not how fast they are."""

import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hydra.utils import instantiate
from transformers import PreTrainedModel

from lctrain.benchmark.length import LADDER
from lctrain.benchmark.measure import measure
from lctrain.benchmark.peers.whole_step import is_enough
from lctrain.benchmark.random_model import RandomModel
from lctrain.benchmark.run import main
from lctrain.benchmark.step import choose
from lctrain.benchmark.trace import summarize
from lctrain.config import compose
from lctrain.errors import InputError
from lctrain.memory.savings import NOTHING, AutoSavings

SMALL = ["lengths=[64]", "num_steps=1"]


def run(what, folder, *overrides):
    main(compose("benchmark", [f"what={what}", f"run_dir={folder}", *SMALL, *overrides]))


def written(target):
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_step_measures_every_case(tmp_path):
    run("step", tmp_path, "attentions=[full,shifted_sparse]", "lengths=[64,128]")
    rows = written(tmp_path / "step.jsonl")
    assert [(row["attention"], row["length"], len(row["seconds"])) for row in rows] == [
        ("full", 64, 1),
        ("full", 128, 1),
        ("shifted_sparse", 64, 1),
        ("shifted_sparse", 128, 1),
    ]
    assert rows[0]["versions"]["torch"]


def test_tunings_other_than_full_train_random_weights(tmp_path):
    run("step", tmp_path, "tunings=[longlora]", "model.dtype=bfloat16", "memory=checkpoint")
    (row,) = written(tmp_path / "step.jsonl")
    assert row["tuning"] == "LoRATuning and embed, norm"
    assert row["memory"].startswith("all layers recomputed")


def test_length_of_a_given_memory(tmp_path):
    run("length", tmp_path, "ladder=false", "memory=checkpoint")
    (row,) = written(tmp_path / "length.jsonl")
    assert row["length"] == 64
    assert len({str(savings) for savings in LADDER.values()}) == len(LADDER)


def test_a_ladder_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """No point is begun behind the limit; what is written is not measured again, and a failure ends its rung."""
    measured = []

    def one_step(cfg, num_tokens, savings):
        measured.append((num_tokens, str(savings)))
        return {"seconds": [], "error": "out of memory"} if num_tokens > 64 else {"seconds": [1.0]}

    monkeypatch.setattr("lctrain.benchmark.length._one_step", one_step)
    run("length", tmp_path, "lengths=[64,128,256]", "minutes=-1")
    assert not measured
    assert "the same command measures the rest" in capsys.readouterr().out
    run("length", tmp_path, "lengths=[64]")
    assert len(measured) == len(LADDER) + 2  # the loss in tiles, and what memory=auto takes
    run("length", tmp_path, "lengths=[64,128,256]")
    assert len(measured) == 2 * (len(LADDER) + 2)
    assert {num_tokens for num_tokens, _ in measured} == {64, 128}
    assert len(written(tmp_path / "length.jsonl")) == len(measured)


def test_the_last_rung_is_the_plans(tmp_path, monkeypatch):
    """Whatever was instantiated for the rungs before it."""
    recipes = []

    def resolve(cfg, recipe, *_):
        recipes.append(recipe.memory)
        return replace(recipe, memory=NOTHING)

    monkeypatch.setattr("lctrain.benchmark.measure.resolve", resolve)
    run("length", tmp_path)
    assert isinstance(recipes[-1], AutoSavings)
    assert len(recipes) == len(LADDER) + 2


def test_what_failed_is_tried_again_and_other_settings_are_other_points(tmp_path, monkeypatch):
    answers = iter([{"seconds": [], "error": "RuntimeError: busy"}, *({"seconds": [n]} for n in (1.0, 2.0, 3.0))])
    monkeypatch.setattr("lctrain.benchmark.step._measured", lambda cfg, length: next(answers))
    for overrides in ([], [], [], ["objective.loss=tiled"], ["optimizer=sgd"], []):
        run("step", tmp_path, *overrides)
    assert [row["seconds"] for row in written(tmp_path / "step.jsonl")] == [[], [1.0], [2.0], [3.0]]


@pytest.mark.parametrize("what", ["step", "length"])
def test_memory_that_nothing_fits_is_a_row(tmp_path, what):
    run(what, tmp_path, "ladder=false", "memory=auto", "memory.device_memory=0.001")
    assert [row["error"] for row in written(tmp_path / f"{what}.jsonl")] == ["out of memory"]


def test_nothing_is_left_of_what_was_measured():
    """What is left would be missing from what the next plan finds free."""

    def models():
        return {id(x) for x in gc.get_objects() if isinstance(x, PreTrainedModel)}

    gc.collect()
    before = models()
    gc.disable()
    try:
        measure(compose("benchmark", SMALL), 64, num_steps=1, warm_up=0)
        assert models() <= before
    finally:
        gc.enable()


def test_three_steps_are_enough_where_they_are_slow():
    assert not is_enough([50.0, 50.0], 60)
    assert is_enough([50.0, 50.0, 50.0], 60)
    assert not is_enough([1.0] * 10, 60)


def test_trace_is_an_artefact(tmp_path):
    run("trace", tmp_path)
    assert (tmp_path / "trace.json.gz").stat().st_size > 0
    summary = json.loads((tmp_path / "trace_summary.json").read_text())
    assert 0 < summary["busy"] <= 1
    assert summary["kernels"]


def test_busy_is_the_union_of_spans():
    def event(name, start, end, kind="CUDA"):
        span = SimpleNamespace(start=start, end=end)
        device = SimpleNamespace(name=kind)
        return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=name == "step")

    events = [
        event("step", 0, 100), event("a", 0, 40), event("b", 20, 50), event("a", 90, 100),
        event("cudaStreamSynchronize", 0, 1, kind="CPU"),
    ]  # fmt: skip
    traced = summarize(events, num_compilations=0)
    assert traced.busy == pytest.approx(0.6)
    assert traced.num_synchronizations == 1
    assert traced.kernels == [("a", pytest.approx(50e-6)), ("b", pytest.approx(30e-6))]


def test_random_models_have_the_published_shape():
    import torch

    recipe = instantiate(compose("benchmark", ["tuning=lora"]).model, _convert_="all")
    random = RandomModel.like(recipe, torch.device("cpu"))
    random.check([64])
    assert random.base_config().hidden_size == recipe.base_config().hidden_size
    weight = "model.embed_tokens.weight"
    parameters = [dict(made.build().get_base_model().named_parameters())[weight] for made in (random, recipe)]
    assert not torch.equal(*parameters)


@pytest.mark.parametrize(
    ("override", "message"),
    [("peers=[nobody]", "peers: nobody is none"), ("attentions=[ful]", "did you mean 'full'")],
)
def test_refusals(override, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run("step", tmp_path, override)


def test_chosen_groups_replace_each_other_and_no_choice_keeps_what_is_configured():
    cfg = compose("benchmark", ["attention=sliding_window", "attention.sliding_window=8"])
    assert "sliding_window" not in choose(cfg, attention="full").attention
    assert choose(cfg, attention=None).attention.sliding_window == 8
