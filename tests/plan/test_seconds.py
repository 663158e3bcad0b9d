"""Step times against those of one H200 in docs/results/plan.md, to which the rates were fitted."""

from dataclasses import replace

import pytest
from hydra.utils import instantiate

from lctrain.attention.full import FullAttention
from lctrain.attention.shifted_sparse import ShiftedSparseAttention
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.config import compose
from lctrain.errors import InputError
from lctrain.memory.savings import NOTHING
from lctrain.plan.cards import card
from lctrain.plan.flops import attention_flops
from lctrain.plan.run import plan
from lctrain.plan.seconds import work

FULL, WINDOW = FullAttention(), SlidingWindowAttention(sliding_window=4096)
S2, S2_IN_TOKENS = ShiftedSparseAttention(), ShiftedSparseAttention(group_size_ratio=None, group_size=2**14)


@pytest.fixture(scope="module")
def models():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        recipes = {
            tuning: instantiate(compose("plan", ["model=llama3_8b", f"tuning={tuning}"]).model, _convert_="all")
            for tuning in ("lora", "longlora")
        }
        return {tuning: recipe.skeleton(recipe.config()) for tuning, recipe in recipes.items()}


def seconds(model, method, length, precision=None, **savings):
    found = work(model, attention_flops(model.config, method, length), replace(NOTHING, **savings), precision == "fp8")
    return found.seconds(card("H200")) * length


def keeping(num_recomputed):
    """Layers that run again, but for their attention."""
    return {"checkpoint_layers": num_recomputed, "save_attention": num_recomputed}


ALL = {"checkpoint_layers": 32, "kv_heads_at_a_time": 2}
EVERY_SECOND = ALL | {"checkpoint_every": 2}


@pytest.mark.parametrize(
    ("tuning", "method", "length", "savings", "measured"),
    [
        ("lora", FULL, 2**15, {}, 3.37),
        ("lora", S2, 2**15, {}, 2.19),
        ("lora", FULL, 2**16, keeping(17), 10.54),
        ("lora", S2, 2**16, keeping(17), 5.71),
        ("longlora", S2, 2**16, keeping(19), 5.77),
        ("lora", S2, 2**16, keeping(18) | {"precision": "fp8"}, 4.59),
        ("lora", FULL, 2**17, keeping(28), 34.76),
        ("lora", S2, 2**17, keeping(28), 15.10),
        ("lora", FULL, 2**19, ALL | {"save_attention": 15}, 513.6),
        ("longlora", S2, 2**19, ALL | {"save_attention": 15}, 156.9),
        ("lora", S2_IN_TOKENS, 2**20, EVERY_SECOND, 138.3),
        ("lora", WINDOW, 2**20, EVERY_SECOND, 119.7),
    ],
)
def test_measured_steps(models, tuning, method, length, savings, measured):
    assert seconds(models[tuning], method, length, **savings) == pytest.approx(measured, rel=0.05)


def test_what_is_recomputed_costs(models):
    recomputed = {"checkpoint_layers": 32}
    each = [{}, recomputed, recomputed | {"kv_heads_at_a_time": 1}, recomputed | {"checkpoint_every": 4}]
    costs = [seconds(models["lora"], FULL, 2**16, **savings) for savings in each]
    assert costs == sorted(set(costs))


def test_an_unknown_card_is_refused():
    with pytest.raises(InputError, match="device=abacus is none of H200"):
        card("abacus")


def test_the_plan_tells_seconds_of_a_card_only(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    overrides = ["model=llama3_8b", "model.architecture={num_hidden_layers: 1}", "tuning=lora", "kernel=flex"]
    assert plan(compose("plan", overrides)).stages[0].seconds > 0
    on_cpu = [*overrides[:-1], "trainer.accelerator=cpu"]
    assert plan(compose("plan", on_cpu)).hours is None
