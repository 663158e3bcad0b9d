"""Step times against those of one H200 in docs/results/step.md, to which the rates were fitted."""

from dataclasses import replace

import pytest

from lctrain.attention.full import FullAttention
from lctrain.attention.shifted_sparse import ShiftedSparseAttention
from lctrain.config import compose
from lctrain.errors import InputError
from lctrain.memory.savings import NOTHING
from lctrain.plan.flops import attention_flops
from lctrain.plan.run import plan
from lctrain.plan.seconds import Work, work

S2, FULL = ShiftedSparseAttention(group_size_ratio=0.25), FullAttention()


@pytest.fixture(scope="module")
def model():
    from hydra.utils import instantiate

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        recipe = instantiate(compose("plan", ["model=llama3_8b", "tuning=lora"]).model, _convert_="all")
        return recipe.skeleton(recipe.config())


def seconds(model, method, length, num_recomputed, fp8=False):
    savings = replace(NOTHING, checkpoint_layers=num_recomputed, save_attention=num_recomputed)
    return work(model, attention_flops(model.config, method, length), savings, fp8).seconds("H200") * length


@pytest.mark.parametrize(
    ("method", "length", "num_recomputed", "fp8", "measured"),
    [
        (S2, 65536, 17, False, 5.60),
        (S2, 131072, 28, False, 14.94),
        (FULL, 65536, 17, False, 10.29),
        (FULL, 131072, 28, False, 33.69),
        (S2, 65536, 18, True, 4.52),
    ],
)
def test_measured_steps(model, method, length, num_recomputed, fp8, measured):
    assert seconds(model, method, length, num_recomputed, fp8) == pytest.approx(measured, rel=0.05)


def test_what_is_recomputed_costs(model):
    kept = seconds(model, FULL, 65536, 0)
    recomputed = seconds(model, FULL, 65536, 32)
    attention = attention_flops(model.config, FULL, 65536)
    changes = {}, {"kv_heads_at_a_time": 1}, {"checkpoint_every": 4}
    savings = [replace(NOTHING, checkpoint_layers=32, **change) for change in changes]
    more = [work(model, attention, each, False).seconds("H200") * 65536 for each in savings]
    assert kept < recomputed < more[0] < more[1] < more[2]


def test_an_unknown_card_is_refused():
    with pytest.raises(InputError, match="device=abacus is none of H200"):
        Work(matrix=1, fp8=0, attention=0, moved=0).seconds("abacus")


def test_the_plan_tells_seconds_of_a_card_only(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    overrides = ["model=llama3_8b", "model.architecture={num_hidden_layers: 1}", "tuning=lora", "kernel=flex"]
    assert plan(compose("plan", overrides)).stages[0].seconds_per_token > 0
    on_cpu = [*overrides[:-1], "trainer.accelerator=cpu"]
    assert plan(compose("plan", on_cpu)).stages[0].seconds_per_token is None
