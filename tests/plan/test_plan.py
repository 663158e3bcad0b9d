"""The plan against reality: a real small Llama's parameters, saved tensors and FLOPs."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lctrain.attention.duo import DuoAttention
from lctrain.attention.full import FullAttention
from lctrain.attention.shifted_sparse import ShiftedSparseAttention
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.config import compose
from lctrain.errors import InputError
from lctrain.memory.savings import NOTHING
from lctrain.model.head import unwrap
from lctrain.model.install import equip
from lctrain.model.tuning import FullTuning, LoRATuning, ModuleTuning, Tuning
from lctrain.plan.flops import training_flops
from lctrain.plan.memory import Memory, StepMemory
from lctrain.plan.run import Plan, main, plan, verdict
from lctrain.plan.simulation import Step

LENGTH = 512
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
LORA = LoRATuning(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], trainable=["embed", "norm"])
adamw = torch.optim.AdamW


def llama(
    tuning: Tuning, device: str, dtype: torch.dtype = torch.float32, checkpointing: bool = False, **shape: Any
) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE | shape), dtype=dtype, attn_implementation="sdpa")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return tuning.apply(model).train()


def memory(
    tuning: Tuning | None = None,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    method: Any = None,
    optimizer: Callable[..., Any] = adamw,
    shape: dict[str, int] | None = None,
    **step: Any,
) -> Memory:
    model = llama(tuning or FullTuning(), "meta", dtype, checkpointing, **(shape or {}))
    given = {"rows": 1, "length": LENGTH, "kernel": "flex", "autocast": False, "num_devices": 1} | step
    method = method or FullAttention()
    with torch.device("meta"):
        equip(unwrap(model), method)
    return StepMemory(model, method, Step(**given), optimizer)(NOTHING)


def saved_bytes(model: Any, autocast: bool) -> int:
    """What autograd really keeps of a forward, parameters apart, and its output."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    tensors = []  # alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        tensors.append(tensor)
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(LENGTH)[None] % SHAPE["vocab_size"]
    positions = torch.arange(LENGTH)[None]
    decoder = (model.get_base_model() if hasattr(model, "peft_config") else model).get_decoder()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        pack(decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state)
    return sum(kept.values())


@pytest.mark.parametrize("tuning", [FullTuning(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "mixed"])
def test_activations_are_those_that_autograd_keeps(tuning, checkpointing, precision):
    dtype, autocast = torch.bfloat16 if precision == "bfloat16" else torch.float32, precision == "mixed"
    real = saved_bytes(llama(tuning, "cpu", dtype, checkpointing), autocast)
    predicted = memory(tuning, dtype, checkpointing, autocast=autocast)
    assert predicted.activations == pytest.approx(real, rel=0.15)
    assert real > LENGTH * SHAPE["hidden_size"] * SHAPE["num_hidden_layers"] * 2


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_stays_is_counted_to_the_byte(dtype, itemsize):
    model = llama(FullTuning(), "cpu", dtype)
    numel = sum(p.numel() for p in model.parameters())
    buffers = sum(b.untyped_storage().nbytes() for b in model.buffers())
    planned = memory(dtype=dtype)
    assert planned.weights == pytest.approx(numel * itemsize + buffers, abs=256)
    assert planned.gradients == numel * itemsize
    assert planned.optimizer == 2 * numel * itemsize  # AdamW: two moments
    assert planned.buckets == 0


def test_frozen_parameters_cost_their_weights_only():
    frozen, full = memory(ModuleTuning(trainable=["norm"])), memory()
    norms = (2 * SHAPE["num_hidden_layers"] + 1) * SHAPE["hidden_size"]
    assert (frozen.gradients, frozen.optimizer) == (norms * 4, norms * 8)
    assert frozen.weights == full.weights
    assert frozen.activations < full.activations  # a frozen layer does not keep its input


def test_the_optimizer_decides_about_its_states():
    plain = memory(optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    momentum = memory(optimizer=lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9))
    assert plain.optimizer == 0
    assert momentum.optimizer == momentum.gradients


def test_tied_embeddings_are_there_once():
    saved = memory().weights - memory(shape={"tie_word_embeddings": True}).weights
    assert saved == SHAPE["vocab_size"] * SHAPE["hidden_size"] * 4


def test_checkpointing_trades_activations_for_one_layer():
    kept, recomputed = memory(), memory(checkpointing=True)
    assert recomputed.activations < kept.activations / 4
    assert recomputed.backward > kept.backward
    assert recomputed.peak < kept.peak


def test_activations_grow_with_tokens_and_layers():
    one = memory().activations
    assert memory(rows=2).activations == pytest.approx(2 * one, rel=0.05)
    assert memory(length=2 * LENGTH).activations == pytest.approx(2 * one, rel=0.05)
    assert memory(shape={"num_hidden_layers": 4}).activations == pytest.approx(2 * one, rel=0.05)
    assert memory(dtype=torch.bfloat16).activations < 0.8 * one


def test_the_loss_never_holds_all_logits():
    shape = {"vocab_size": 2**18}
    short, long = (memory(ModuleTuning(trainable=["norm"]), shape=shape, length=n).loss for n in (1024, 4096))
    assert 0 < long - short <= 3072 * SHAPE["hidden_size"] * 4 * 3  # hidden states and their gradients, no logits
    assert long < 4096 * 2**18 * 4 / 2


def test_what_several_devices_exchange_is_what_they_keep():
    """DistributedDataParallel's buckets are the gradients."""
    assert memory(num_devices=4).resident == memory().resident


def test_masks_cost_by_kernel_and_pattern():
    window = SlidingWindowAttention(sliding_window=64)
    two_widths = SlidingWindowAttention(sliding_window=[64, 32])
    flex, dense = memory(method=window).attention, memory(method=window, kernel="sdpa").attention
    tables = 4 * 4 * (LENGTH // 128) ** 2
    assert dense - flex == LENGTH**2 * 4 // 2 - tables
    assert memory(method=two_widths).attention - flex == tables
    per_head = memory(method=ShiftedSparseAttention(group_size_ratio=0.25)).attention
    assert per_head - flex == (SHAPE["num_attention_heads"] - 1) * tables


DUO = DuoAttention(num_sink_tokens=4, recent_size=60, initial_gate=1.0, clamp=True)


def test_two_branches_keep_two_outputs():
    """Of each layer another output [B, L, H, D] and its log-sum-exp, and their mixture; of q, k, v nothing more."""
    per_layer = LENGTH * (2 * SHAPE["hidden_size"] + SHAPE["num_attention_heads"]) * 4
    more = memory(method=DUO).activations - memory().activations
    assert more == pytest.approx(per_layer * SHAPE["num_hidden_layers"], rel=0.05)


def test_a_teacher_costs_its_forward_and_what_is_compared():
    model = llama(FullTuning(), "meta")
    head = SHAPE["vocab_size"] * SHAPE["hidden_size"]
    alone = training_flops(model, FullAttention(), LENGTH)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) - head
    attention = 4 * SHAPE["hidden_size"] * SHAPE["num_hidden_layers"] * (LENGTH + 1) / 2
    taught = training_flops(model, FullAttention(), LENGTH, teacher=True)
    assert taught == pytest.approx(alone - 6 * head + 2 * linear + attention, rel=1e-3)
    one, all_layers = (memory(num_compared=n).loss for n in (1, 2))
    assert all_layers - one == 2 * LENGTH * SHAPE["hidden_size"] * 4


def test_a_kernel_that_holds_every_score_is_not_planned():
    with pytest.raises(InputError, match="kernel=reference"):
        memory(kernel="reference")


@pytest.mark.parametrize("tuning", [FullTuning(), LORA], ids=["full", "lora"])
def test_flops_are_those_that_run(tuning):
    model = llama(tuning, "meta", num_hidden_layers=6)
    ids = torch.zeros(1, LENGTH, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        logits = model(
            input_ids=ids, attention_mask=torch.empty(1, 1, LENGTH, LENGTH, device="meta"), use_cache=False
        ).logits
        logits.sum().backward()
    config = model.config
    visible = (LENGTH + 1) / 2  # the counter counts all keys of a masked attention, we those that are seen
    attention = 3 * 4 * config.hidden_size * config.num_hidden_layers
    planned = training_flops(model, FullAttention(), LENGTH)
    linear = counter.get_total_flops() / LENGTH - attention * LENGTH
    assert planned == pytest.approx(linear + attention * visible, rel=0.05)


def test_flops_by_hand():
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False).requires_grad_(False))
    model.config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1)
    # 2 · 128 weights: 4 each, 2 more for those that train; 3 · 4 · 2 heads · 4 · (1 + 2 + 3 + 4) / 4 keys
    assert training_flops(model, FullAttention(), 4) == 4 * 256 + 2 * 128 + 12 * 8 * 2.5


def test_gate_training_plans():
    duo = ["attention=duo", "attention.num_sink_tokens=4", "attention.recent_size=60", "tuning=gates"]
    duo += ["model.architecture.num_key_value_heads=2"]
    one, every = (tiny(*duo, "objective=duo", f"objective.layers={layers}") for layers in ("last", "all"))
    assert one.trainable == 2 * 2
    assert every.memory.loss > one.memory.loss
    assert one.stages[0].flops_per_token > tiny(*duo).stages[0].flops_per_token


RECIPES = ["longlora_7b_32k", "longlora_7b_100k", "prolong_8b_64k", "prolong_8b_512k", "sft_longalpaca"]
SMALL = ["model.architecture.num_hidden_layers=1", "trainer.max_steps=8"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_published_recipes_plan_without_weights_or_network(recipe):
    planned = plan(compose("plan", [f"experiment={recipe}", *SMALL]))
    assert planned.mesh.world_size == 8
    assert planned.num_steps == 8
    assert planned.memory.peak > planned.memory.resident > 0


@pytest.mark.parametrize(
    ("recipe", "tokens", "length"),
    [
        ("longlora_7b_32k", 64 * 2**15, 2**15),
        ("prolong_8b_64k", 64 * 2**16, 2**16),
        ("prolong_8b_512k", 16 * 2**19, 2**19),
    ],
)
def test_the_published_batches(recipe, tokens, length):
    cfg = compose("plan", [f"experiment={recipe}"])
    world = cfg.trainer.devices * cfg.datamodule.micro_batch_size * cfg.trainer.accumulate_grad_batches
    assert (world * cfg.sequence_length, cfg.sequence_length) == (tokens, length)


TINY = [
    "model.path=nobody/nothing",
    "model.dtype=float32",
    "model.architecture="
    + json.dumps(SHAPE | {"model_type": "llama", "max_position_embeddings": 128}).replace('"', ""),
    "sequence_length=512",
    "trainer.max_steps=10",
]


def tiny(*overrides: str) -> Plan:
    return plan(compose("plan", [*TINY, *overrides]))


def test_parameters_are_a_real_models():
    planned = tiny("tuning=longlora")
    full = tiny()
    assert full.parameters == full.trainable == sum(p.numel() for p in llama(FullTuning(), "cpu").parameters())
    adapters = 2 * 4 * 8 * (64 + 64)  # layers · projections · r · (in + out)
    trained = adapters + 320 * 64 + 5 * 64  # and embeddings and norms
    assert (planned.parameters, planned.trainable) == (full.parameters + adapters, trained)


def test_tokens_and_stages():
    planned = tiny(
        "curriculum=staged", "trainer.accumulate_grad_batches=2", "datamodule.micro_batch_size=3", "num_devices=4"
    )
    assert planned.tokens_per_step == 512 * 2 * 3 * 4
    assert [(s.length, s.num_steps) for s in planned.stages] == [(128, 2), (256, 2), (512, 6)]
    by_length = [s.flops_per_token for s in planned.stages]
    assert by_length == sorted(by_length)
    assert planned.flops == sum(s.num_steps * s.flops_per_token for s in planned.stages) * planned.tokens_per_step


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_ropes_that_look_at_positions_plan(rope):
    assert tiny(f"rope={rope}").memory.peak > 0


def test_the_verdict_turns_at_the_peak():
    cfg = compose("plan", TINY)
    planned = plan(cfg)
    cfg.device_memory = planned.memory.peak / 2**30 * 1.01
    assert verdict(planned, cfg).startswith("fits: ")
    cfg.device_memory = planned.memory.peak / 2**30 * 0.5
    answer = verdict(planned, cfg)
    assert answer.startswith("does not fit: ")
    assert "what would help: memory=auto" in answer


def test_prints_everything_and_allocates_nothing(capsys):
    main(compose("plan", [*TINY, "device_memory=0.001"]))
    printed = capsys.readouterr().out
    for name in ("trainable", "tokens of the run", "FLOPs", *Memory.__annotations__, "peak", "does not fit"):
        assert name in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["device_memory=0"], "device_memory=0"),
        (["num_devices=auto"], "num_devices=auto"),
        (["trainer.max_steps=-1"], "max_steps=-1"),
        (["kernel=reference"], "kernel=reference"),
        (["kernel=fast"], "no kernel 'fast'"),
        (["model.path=/nowhere/at/all"], "does not exist"),
        (["attention=sliding_window", "attention.sliding_window=4096"], "wider than the longest"),
        (["attention=shifted_sparse", "attention.group_size_ratio=0.3"], "not divisible"),
        (["tuning=modules", "tuning.trainable=[nothing]"], "no parameter name holds 'nothing'"),
        (["model.dtype=float12"], "model.dtype=float12"),
    ],
)
def test_refusals(overrides, message):
    with pytest.raises(InputError, match=message):
        main(compose("plan", [*TINY, *overrides]))
