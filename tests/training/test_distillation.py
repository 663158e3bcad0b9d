"""The distance from full attention, by hand and however a step is computed; what has no teacher is refused."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from lctrain.attention.duo import DuoAttention
from lctrain.attention.full import FullAttention
from lctrain.attention.streaming import StreamingAttention
from lctrain.checkpoint import read_values
from lctrain.errors import InputError
from lctrain.folder import read_history
from lctrain.memory.savings import NOTHING, Savings
from lctrain.model.head import hidden_states
from lctrain.model.install import attention_modules
from lctrain.model.recipe import PretrainedModel
from lctrain.model.teacher import teaching
from lctrain.model.tuning import FullTuning, LoRATuning, ModuleTuning
from lctrain.rope.none import NoScaling
from lctrain.training.distillation import Distillation
from lctrain.training.gates import gates_of

STREAMING = StreamingAttention(num_sink_tokens=2, recent_size=4)
DUO = DuoAttention(num_sink_tokens=2, recent_size=4, initial_gate=0.5, clamp=True)
LORA = LoRATuning(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "o_proj"], trainable=[])
GATES = ModuleTuning(trainable=["head_gates"])
ALL = [("hidden_state", "last"), ("hidden_state", "all"), ("attention_output", "last"), ("attention_output", "all"),
       ("logit_kl", "last")]  # fmt: skip
distillation = partial(Distillation, gate_weight=0.0, gate_reduction="sum")


@pytest.fixture
def recipe(saved):
    def make(**changes):
        settings = {
            "path": str(saved("llama", num_hidden_layers=4)), "revision": "main", "use_safetensors": True,
            "trust_remote_code": False, "architecture": None, "dtype": "float32", "memory": NOTHING,
            "attention": DUO, "rope": NoScaling(), "tuning": GATES, "sequence_length": 64, "kernel": "auto",
            "layer_kernel": "auto", "precision": None,
        }  # fmt: skip
        return PretrainedModel(**settings | changes)

    return make


@pytest.fixture
def batch(ids):
    """Two rows, two documents in the second, labels at some tokens only."""
    tokens = ids(2, 41)
    positions = torch.stack([torch.arange(40), torch.cat([torch.arange(17), torch.arange(23)])])
    chosen = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.4
    labels = tokens[:, 1:].where(chosen, -100)
    return {"input_ids": tokens[:, :-1], "labels": labels, "position_ids": positions}


def observed(model, batch):
    """Everything that may be compared, by plain hooks: hidden states of layers and at the end, attention, logits."""
    states = {"layers": [], "attention": []}
    decoder = model.get_decoder()
    hooks = [layer.register_forward_hook(lambda m, a, out: states["layers"].append(out)) for layer in decoder.layers]
    hooks += [
        module.register_forward_hook(lambda m, a, out: states["attention"].append(out[0]))
        for module in attention_modules(model)
    ]
    last = hidden_states(model, batch["input_ids"], batch["position_ids"])
    for hook in hooks:
        hook.remove()
    return states | {"last": last, "logits": model.get_output_embeddings()(last)}


def by_hand(objective, student, teacher, chosen):
    if objective.loss == "logit_kl":
        logits = [state["logits"][chosen].log_softmax(-1) for state in (student, teacher)]
        return kl_div(*logits, reduction="sum", log_target=True)
    every = {"hidden_state": "layers", "attention_output": "attention"}[objective.loss]
    if objective.layers == "last":
        pairs = (
            [(student["last"], teacher["last"])] if every == "layers" else [(student[every][-1], teacher[every][-1])]
        )
    else:
        pairs = list(zip(student[every], teacher[every], strict=True))
    return sum((a - b)[chosen].square().mean(-1).sum() for a, b in pairs) / len(pairs)


@pytest.mark.parametrize(("loss", "layers"), ALL)
@pytest.mark.parametrize("tuning", [GATES, LORA], ids=["gates", "lora"])
def test_the_loss_and_its_gradients_are_those_by_hand(recipe, batch, loss, layers, tuning):
    objective = distillation(loss=loss, layers=layers)
    model = recipe(attention=DUO if tuning is GATES else STREAMING, tuning=tuning).build().train()
    teacher = recipe(attention=FullAttention(), tuning=FullTuning()).build()
    trained = [p for p in model.parameters() if p.requires_grad]
    if tuning is LORA:
        for p in trained:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    base = model.get_base_model() if tuning is LORA else model
    expected = by_hand(objective, observed(base, batch), observed(teacher, batch), batch["labels"] != -100)
    expected_gradients = torch.autograd.grad(expected, trained)
    terms = objective(model, batch)
    assert list(terms) == [loss]
    torch.testing.assert_close(terms[loss], expected.detach(), rtol=1e-4, atol=1e-6)
    gradients = torch.autograd.grad(terms[loss], trained)
    assert any(g.abs().max() > 1e-4 for g in gradients)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max() + 1))


@pytest.mark.parametrize(("loss", "layers"), ALL)
def test_an_open_gate_is_no_distance(recipe, batch, loss, layers):
    model = recipe(attention=DuoAttention(num_sink_tokens=2, recent_size=4, initial_gate=1.0, clamp=True)).build()
    assert float(distillation(loss=loss, layers=layers)(model, batch)[loss]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("loss", "layers"), ALL)
@pytest.mark.parametrize(
    ("every", "attention", "heads"), [(1, 0, 0), (2, 2, 0), (1, "all", 0), (1, "all", 1), (1, 0, 1)]
)
def test_what_is_recomputed_changes_nothing(recipe, batch, loss, layers, every, attention, heads):
    saving = Savings(
        checkpoint_layers=3, checkpoint_every=every, save_attention=attention, offload=0, mlp_tile=16,
        kv_heads_at_a_time=heads,
    )  # fmt: skip
    results = []
    for memory in (NOTHING, saving):
        model = recipe(memory=memory).build().train()
        terms = distillation(loss=loss, layers=layers)(model, batch)
        terms[loss].backward()
        results.append([terms[loss].detach(), *(gates.grad for gates in gates_of(model))])
    for a, b in zip(*results, strict=True):
        # Heads at a time are summed in another order.
        torch.testing.assert_close(a, b, rtol=1e-4 if heads else 1e-5, atol=1e-7)


def test_the_teacher_is_the_base_in_full_attention_and_leaves_no_trace(recipe, batch):
    model = recipe(attention=STREAMING, tuning=LORA).build().train()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for _, p in model.named_parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    forward = partial(hidden_states, model, batch["input_ids"], batch["position_ids"])
    before = forward()
    with teaching(model):
        taught = forward()
    assert not taught.requires_grad
    base = recipe(attention=FullAttention(), tuning=FullTuning()).build()
    torch.testing.assert_close(taught, hidden_states(base, batch["input_ids"], batch["position_ids"]))
    assert torch.equal(forward(), before)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


@pytest.mark.parametrize(("reduction", "expected"), [("sum", 0.05 * 0.5 * 8), ("mean", 0.05 * 0.5)])
def test_gates_are_weighed_once_a_token(recipe, batch, reduction, expected):
    objective = Distillation(loss="hidden_state", layers="last", gate_weight=0.05, gate_reduction=reduction)
    term = objective(recipe().build(), batch)["gates"]
    assert term.item() / int((batch["labels"] != -100).sum()) == pytest.approx(expected)


DIVIDED = [
    *("attention=duo", "attention.num_sink_tokens=2", "attention.recent_size=4", "tuning=gates", "objective=duo"),
    *("callbacks=gates", "datamodule.packing=whole", "optimizer=sgd", "optimizer.lr=0.5", "trainer.max_steps=2"),
    *("rope=none", "rope.extrapolate=true", "sequence_length=128", "scheduler.num_warmup_steps=0"),
]


def test_a_step_is_the_same_however_it_is_divided_and_has_the_gates_once(run, tmp_path):
    histories, weights = [], []
    for accumulate in (1, 4):
        sizes = [f"trainer.accumulate_grad_batches={accumulate}", f"datamodule.micro_batch_size={4 // accumulate}"]
        run(f"run_dir={tmp_path}/{accumulate}", *sizes, *DIVIDED)
        histories.append(read_history(tmp_path / f"{accumulate}/metrics.jsonl"))
        weights.append(read_values(tmp_path / f"{accumulate}/checkpoints/step-00000002.ckpt"))
    for one, other in zip(*histories, strict=True):
        for name in ("loss", "loss/hidden_state", "loss/gates", "grad_norm", "gates/mean"):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-8), name
        assert one["loss"] == pytest.approx(one["loss/hidden_state"] + one["loss/gates"])
        assert "perplexity" not in one
    first, second = histories[0]
    assert first["loss/gates"] == pytest.approx(0.05 * 4)  # two layers of two gates, all at 1
    assert second["loss/gates"] == pytest.approx(0.05 * 4 * first["gates/mean"])
    assert 0 < first["gates/mean"] < 1
    assert all(torch.allclose(weights[0][name], weights[1][name], rtol=0, atol=1e-6) for name in weights[0])
    assert len(weights[0]) == 2


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ({"loss": "mse"}, {}, "objective.loss=mse is none of hidden_state, attention_output, logit_kl"),
        ({"layers": "some"}, {}, "objective.layers=some is none of last, all"),
        ({"loss": "logit_kl", "layers": "all"}, {}, "use objective.layers=last"),
        ({"gate_weight": -1.0}, {}, "gate_weight=-1.0 must be a number that is not negative"),
        ({"gate_weight": float("nan")}, {}, "gate_weight=nan must be a number"),
        ({"gate_reduction": "max"}, {}, "neither sum nor mean"),
        ({"gate_weight": 0.05}, {"attention": STREAMING, "tuning": LORA}, "StreamingAttention has none; set it to 0"),
        ({}, {"attention": FullAttention(), "tuning": LORA}, "attention=full is the teacher"),
        ({}, {"tuning": FullTuning()}, "needs a teacher that stays as it is, and this tuning trains 3"),
        ({}, {"tuning": ModuleTuning(trainable=["norm", "head_gates"])}, "trains 9 of the model's own"),
    ],
)
def test_what_has_no_meaning_or_no_teacher_is_refused(recipe, objective, changes, message):
    settings = {"loss": "hidden_state", "layers": "last", "gate_weight": 0.0, "gate_reduction": "sum"} | objective
    with pytest.raises(InputError, match=message):
        Distillation(**settings).check(torch.device("cpu"), recipe(**changes))


def test_gates_can_be_recorded_only_where_there_are_some(run, tmp_path):
    with pytest.raises(InputError, match="callbacks=gates records the gates of attention=duo"):
        run("callbacks=gates")
    assert not Path(tmp_path / "run").exists()
