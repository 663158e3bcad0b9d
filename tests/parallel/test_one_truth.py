"""Losses, gradient norms and weights of 20 optimizer steps are those of one process, however they are computed.

Packed whole documents leave padding at the ends of rows, so that ranks and micro-batches differ in their valid tokens.
"""

import pytest
import torch

from lctrain.checkpoint import read_values
from lctrain.folder import read_history
from tests.parallel.ranks import Runs, on_cards

ATTENTION = {
    "full": [],
    "sliding_window": ["attention=sliding_window", "attention.sliding_window=16"],
    "streaming": ["attention=streaming", "attention.num_sink_tokens=4", "attention.recent_size=16"],
    "shifted_sparse": ["attention=shifted_sparse"],
}
OPTIMIZER = {
    "sgd": ["optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9"],
    # eps is above the rounding of a gradient that should be 0: or its sign alone would make whole steps.
    "adamw": ["optimizer.lr=1e-3", "optimizer.weight_decay=0.1", "optimizer.eps=1e-5"],
}
SHARED = [
    *("trainer.max_steps=20", "trainer.gradient_clip_val=0.5", "trainer.val_check_interval=1000"),
    *("datamodule.packing=whole", "callbacks.checkpoint.every_num_steps=null", "scheduler.num_warmup_steps=2"),
]
DUO = [  # only gates train, towards the same model's full attention
    *("attention=duo", "attention.num_sink_tokens=2", "attention.recent_size=4", "tuning=gates", "callbacks=gates"),
    *("objective=duo", "optimizer.lr=0.02", "optimizer.eps=1e-5"),
]
STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
ROWS_PER_STEP = 8
FP32, BF16 = 1e-5, 3e-2
HALF = 0.1  # norms, embeddings and their gradients are rounded too: 0.04 of a loss of 5.5 was seen
GROUPS_ON_CARDS = {1: 2, 2: 3}  # of ranks → side by side; cards take turns between processes, which slows exchanges


def case(attention, optimizer, *others, ranks=1, sp=1, accumulate=1):
    rows = ROWS_PER_STEP * sp // (ranks * accumulate)
    divided = [f"datamodule.micro_batch_size={rows}", f"trainer.accumulate_grad_batches={accumulate}"]
    chosen = DUO if attention == "duo" else [*ATTENTION[attention], *OPTIMIZER[optimizer]]
    return [*chosen, *SHARED, *divided, f"sequence_parallel_size={sp}", *others]


def references():
    cases = {f"{a}-{o}": case(a, o) for a in ATTENTION for o in OPTIMIZER}
    for tuning in ("lora", "longlora"):
        cases[tuning] = case("shifted_sparse", "adamw", f"tuning={tuning}")
    cases["duo"] = case("duo", "adamw")
    for tuning in ("full", "longlora"):
        cases[f"bf16-{tuning}"] = case("shifted_sparse", "adamw", f"tuning={tuning}", "model.dtype=bfloat16")
    return cases


def on_two_ranks():
    """Every strategy x sequence parallelism x attention; optimizers and accumulation take turns."""
    cases, turns = {}, [("sgd", 1), ("adamw", 4), ("adamw", 1), ("sgd", 4)]
    for i, attention in enumerate(ATTENTION):
        for sp in (1, 2):
            for j, strategy in enumerate(STRATEGIES):
                optimizer, accumulate = turns[(i + j + sp) % 4]
                name = f"{attention}-{optimizer}/{strategy}-sp{sp}-accumulate{accumulate}"
                cases[name] = case(attention, optimizer, f"strategy={strategy}", ranks=2, sp=sp, accumulate=accumulate)
    for tuning in ("lora", "longlora", "bf16-full", "bf16-longlora"):
        dtype = ["model.dtype=bfloat16"] if tuning.startswith("bf16") else []
        for strategy, sp in (("ddp", 2), ("zero2", 1), ("zero3", 2)):
            words = [f"strategy={strategy}", f"tuning={tuning.removeprefix('bf16-')}", *dtype]
            cases[f"{tuning}/{strategy}-sp{sp}"] = case("shifted_sparse", "adamw", *words, ranks=2, sp=sp)
    for strategy, sp, accumulate in (("ddp", 2, 4), ("zero2", 1, 4), ("zero3", 2, 1)):
        words = f"duo/{strategy}-sp{sp}-accumulate{accumulate}"
        cases[words] = case("duo", "adamw", f"strategy={strategy}", ranks=2, sp=sp, accumulate=accumulate)
    heads = ["memory=checkpoint", "memory.kv_heads_at_a_time=1", "memory.save_attention=1"]
    cases["lora/heads-ddp-sp2"] = case("shifted_sparse", "adamw", "tuning=lora", "strategy=ddp", *heads, ranks=2, sp=2)
    cases["full-adamw/heads-zero2-sp2"] = case("full", "adamw", "strategy=zero2", *heads, ranks=2, sp=2)
    half = ["strategy=zero3", "strategy.half_precision=true", "tuning=full", "model.dtype=bfloat16"]
    cases["bf16-full/zero3-half"] = case("shifted_sparse", "adamw", *half, ranks=2, sp=2)
    offload = ["strategy=zero3", "strategy.offload_optimizer=true", "strategy.offload_parameters=true"]
    cases["full-adamw/zero3-offload"] = case("full", "adamw", *offload, ranks=2)
    cases["full-adamw/zero1-offload"] = case(
        "full", "adamw", "strategy=zero1", "strategy.offload_optimizer=true", ranks=2
    )
    return cases


def on_four_ranks():
    """Two rows side by side, each on two ranks; and one row on four, more than there are key-value heads."""
    split = [("ddp", 2, 4), ("zero1", 4, 1), ("zero2", 2, 1), ("zero3", 4, 4), ("zero3", 2, 1), ("zero2", 1, 2)]
    return {
        f"{attention}-adamw/4-{strategy}-sp{sp}-accumulate{accumulate}": case(
            attention, "adamw", f"strategy={strategy}", ranks=4, sp=sp, accumulate=accumulate
        )
        for attention, (strategy, sp, accumulate) in zip([*ATTENTION, "shifted_sparse", "full"], split, strict=True)
    }


CASES = {1: references(), 2: on_two_ranks(), 4: on_four_ranks()}


@pytest.fixture(scope="module")
def trained(train_on_ranks):
    """A run for every case, trained by as many processes as it asks for when it is first asked for."""
    runs: dict[int, Runs] = {}

    def of(num_ranks: int) -> Runs:
        if num_ranks not in runs:
            runs[num_ranks] = train_on_ranks(num_ranks, CASES[num_ranks])
        return runs[num_ranks]

    return of


@pytest.mark.parametrize(("num_ranks", "name"), [(n, name) for n in (2, 4) for name in CASES[n]])
def test_it_is_the_run_of_one_process(trained, num_ranks, name):
    compare(trained(1)[name.partition("/")[0]], trained(num_ranks)[name], tolerance_of(name))


@pytest.fixture(scope="module")
def trained_on_cards(train_on_ranks):
    """The same on CUDA devices and NCCL, all of them side by side."""
    return {
        num_ranks: train_on_ranks(
            num_ranks, {name: on_cards(words) for name, words in CASES[num_ranks].items()}, groups
        )
        for num_ranks, groups in GROUPS_ON_CARDS.items()
    }


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", CASES[2])
def test_on_two_cards_it_is_the_run_of_one(trained_on_cards, name):
    one, two = trained_on_cards[1][name.partition("/")[0]], trained_on_cards[2][name]
    compare(one, two, tolerance_of(name))


def tolerance_of(name):
    if name.endswith("half"):
        return HALF
    return BF16 if name.startswith("bf16") else FP32


def test_half_precision_saves_the_copy_that_it_updates(trained):
    """In bf16 a small step would be lost."""
    values = read_values(trained(2)["bf16-full/zero3-half"] / "checkpoints/step-00000020.ckpt").values()
    assert all(value.dtype == torch.float32 for value in values)
    assert any((value != value.bfloat16()).any() for value in values)


def compare(one, many, tolerance):
    """Losses and gradient norms of every step, and the weights after the last."""
    rows, others = read_history(one / "metrics.jsonl"), read_history(many / "metrics.jsonl")
    assert [row["step"] for row in others] == list(range(1, 21))
    for row, other in zip(rows, others, strict=True):
        assert (other["tokens"], other["sequence_length"]) == (row["tokens"], row["sequence_length"])
        assert other["loss"] == pytest.approx(row["loss"], abs=tolerance)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=10 * tolerance)
    checkpoint = "checkpoints/step-00000020.ckpt"
    weights, other_weights = read_values(one / checkpoint), read_values(many / checkpoint)
    assert weights.keys() == other_weights.keys()
    furthest = max(float((weights[key] - other_weights[key]).abs().max()) for key in weights)
    assert furthest < tolerance
    assert rows[0]["loss"] - rows[-1]["loss"] > 100 * tolerance or tolerance >= BF16  # it did train
