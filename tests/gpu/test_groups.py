"""On one card: what several need, in a group of one process. DDP and every ZeRO stage train as strategy=single does
there, under every attention of conf/; and what is exchanged, saved and read, on NCCL.

Another card adds nothing but its share: what a CUDA device or NCCL refuses is seen here.
"""

import json
import os
import runpy
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor
from torch.nn import Parameter

from lctrain.checkpoint import read_values
from lctrain.config import compose, conf_dir
from lctrain.folder import read_history
from lctrain.parallel.mesh import Mesh
from lctrain.parallel.ulysses import Ulysses
from lctrain.training.generators import restore_rng, rng_state
from lctrain.training.strategy import DDP
from tests.parallel.ranks import Runs, Troubles, on_cards

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NUM_PROCESSES = 5  # of one rank each, side by side
NUM_STEPS = 4
MODEL = {"max_position_embeddings": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
FP32, BF16 = 1e-5, 3e-2
OPTIMIZER, PARAMETERS = "strategy.offload_optimizer=true", "strategy.offload_parameters=true"
STRATEGIES = {name: [f"strategy={name}"] for name in ("ddp", "zero1", "zero2", "zero3")} | {
    "zero1-offload": ["strategy=zero1", OPTIMIZER],
    "zero2-offload": ["strategy=zero2", OPTIMIZER],
    "zero3-offload": ["strategy=zero3", OPTIMIZER, PARAMETERS],
}
DTYPES = {"fp32": "model.dtype=float32", "bf16": "model.dtype=bfloat16"}
TUNINGS = ("full", "lora", "longlora")
LEARNED = {  # what trains where the attention brings parameters of its own
    "duo": ["tuning=gates", "callbacks=gates", "objective=duo", "optimizer.lr=0.02"]
}


def attentions() -> dict[str, list[str]]:
    """Every method of conf/attention, at the sizes of its own test: they show in a few tokens."""
    declared = (
        runpy.run_path(str(path)).get("CASES", {}) for path in Path(__file__).parents[1].glob("attention/test_*")
    )
    sizes = {yaml: fields for cases in declared for yaml, fields, _ in cases.values()}
    return {
        path.stem: [
            f"attention={path.stem}",
            *(f"attention.{k}={_word(v)}" for k, v in sizes.get(path.stem, {}).items()),
        ]
        for path in sorted((conf_dir() / "attention").glob("*.yaml"))
    }


def _word(value: Any) -> str:
    return json.dumps(value).replace('"', "")


@cache
def cases() -> dict[str, list[str]]:
    """A run of every attention under every strategy, which types and tunings take turns in; and the one it must be."""
    found: dict[str, list[str]] = {}
    for i, (attention, words) in enumerate(attentions().items()):
        for j, (strategy, chosen) in enumerate(STRATEGIES.items()):
            dtype = list(DTYPES)[(i + j) % len(DTYPES)]
            tuning = "own" if attention in LEARNED else TUNINGS[(i + j // 2) % len(TUNINGS)]
            same = [*words, *LEARNED.get(attention, [f"tuning={tuning}"]), DTYPES[dtype]]
            reference = f"{attention}-{tuning}-{dtype}"
            found[f"{reference}/single"] = [*same, "strategy=single"]
            found[f"{reference}/{strategy}"] = [*same, *chosen]
    return found


def compared() -> list[str]:
    return [name for name in cases() if not name.endswith("/single")]


@pytest.fixture(scope="session")
def trained(saved: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Troubles]:
    """The folder of all runs, and why any failed; trained once, whichever of pytest's processes come here first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "groups"
    with FileLock(f"{folder}.lock"):
        if not (folder / "troubles.json").exists():
            small = f"""model.path={saved("llama", **MODEL)} data=text data.path={text} logger=none
                datamodule.cache_dir={folder / "tokens"} datamodule.num_heldout_tokens=256 sequence_length=64
                rope=linear datamodule.packing=whole datamodule.micro_batch_size=4 trainer.max_steps={NUM_STEPS}
                trainer.devices=1 trainer.val_check_interval=1000 scheduler.num_warmup_steps=2 optimizer.lr=1e-3
                optimizer.eps=1e-5 callbacks.checkpoint.every_num_minutes=null""".split()
            complete = {n: [*small, f"run_dir={folder / n}", *on_cards(words)] for n, words in cases().items()}
            troubles = Runs(folder, 1, complete, NUM_PROCESSES, threading.Event()).troubles()
            (folder / "troubles.json").write_text(json.dumps(troubles))
    return folder, json.loads((folder / "troubles.json").read_text())


def run_of(trained: tuple[Path, Troubles], name: str) -> Path:
    folder, troubles = trained
    if trouble := troubles[name]:
        pytest.fail(trouble, pytrace=False)
    return folder / name


@pytest.mark.parametrize("name", compared())
def test_a_group_of_one_trains_as_no_group(trained: tuple[Path, Troubles], name: str) -> None:
    one, group = (run_of(trained, run) for run in (f"{name.partition('/')[0]}/single", name))
    tolerance = BF16 if "bf16" in name else FP32
    rows, others = read_history(one / "metrics.jsonl"), read_history(group / "metrics.jsonl")
    assert [row["step"] for row in others] == list(range(1, NUM_STEPS + 1))
    for row, other in zip(rows, others, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], abs=tolerance)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=10 * tolerance)
    checkpoint = f"checkpoints/step-{NUM_STEPS:08d}.ckpt"
    weights, other_weights = read_values(one / checkpoint), read_values(group / checkpoint)
    assert weights.keys() == other_weights.keys()
    assert max(float((weights[key] - other_weights[key]).abs().max()) for key in weights) < tolerance


@pytest.mark.parametrize("strategy", ["ddp", "zero2-offload", "zero3"])
def test_what_a_card_wrote_goes_on_without_one(
    trained: tuple[Path, Troubles], saved: Any, text: Path, tmp_path: Path, strategy: str
) -> None:
    """The same step on the CPU, but for sums in another order."""
    from lctrain.training.run import train

    name = next(name for name in compared() if name.endswith(f"-fp32/{strategy}") and not name.startswith("duo"))
    source = run_of(trained, name) / f"checkpoints/step-{NUM_STEPS:08d}.ckpt"
    small = f"""model.path={saved("llama", **MODEL)} data=text data.path={text} logger=none
        datamodule.cache_dir={tmp_path / "tokens"} datamodule.num_heldout_tokens=256 sequence_length=64 rope=linear
        datamodule.packing=whole datamodule.micro_batch_size=4 trainer.max_steps={NUM_STEPS + 1}
        trainer.val_check_interval=1000 scheduler.num_warmup_steps=2 optimizer.lr=1e-3 optimizer.eps=1e-5
        callbacks.checkpoint.every_num_minutes=null kernel=sdpa layer_kernel=plain objective.loss=tiled
        resume={source}""".split()
    words = [word for word in cases()[name] if not word.startswith("strategy")]
    losses = []
    for device in ("cpu", "gpu"):
        own = ["strategy=single", f"trainer.accelerator={device}", f"run_dir={tmp_path / device}"]
        losses.append(train(compose("train", [*small, *words, *own])).history[-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    """This process alone on NCCL, without a port."""
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    yield dist.new_subgroups(1)[0]
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def strategy(group: dist.ProcessGroup) -> DDP:
    ddp = DDP(timeout_minutes=1)
    ddp.parallel_devices, ddp.cluster_environment = [torch.device("cuda", 0)], LightningEnvironment()
    return ddp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_an_exchange_with_oneself_changes_nothing(group: dist.ProcessGroup, dtype: torch.dtype, strided: bool) -> None:
    """Values and gradients, of tensors as projections leave them, too: [B, L, H, D] seen as [B, H, L, D]."""
    shapes = [(2, heads, 6, 8) for heads in (4, 2, 2)]
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = [torch.randn(shape, device="cuda", dtype=dtype, generator=generator) for shape in shapes]
    if strided:
        drawn = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in drawn]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def run(exchanged: bool) -> Sequence[Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in drawn)
        out = Ulysses(group).attend(attention, q, k, v) if exchanged else attention(q, k, v)
        out.backward(out.detach().transpose(1, 2).contiguous().transpose(1, 2))
        return [out, *(x.grad for x in (q, k, v) if x.grad is not None)]

    for one, other in zip(run(exchanged=True), run(exchanged=False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_a_row_is_gathered(group: dist.ProcessGroup) -> None:
    row = torch.arange(12, device="cuda").view(6, 2).T  # strided
    assert torch.equal(Ulysses(group).gather(row), row)


def test_nobody_to_share_a_row_with(group: dist.ProcessGroup) -> None:
    assert Mesh(rank=0, world_size=1, sequence_parallel_size=1).sequence_group() is None


def test_decisions_words_and_counts_are_agreed_upon(strategy: DDP) -> None:
    for decision in (True, False):
        assert strategy.reduce_boolean_decision(decision) is decision
        assert strategy.reduce_boolean_decision(decision, all=False) is decision
    assert strategy.broadcast("checkpoints/step-00000004.ckpt") == "checkpoints/step-00000004.ckpt"
    count = torch.tensor(2**40 + 1, device="cuda", dtype=torch.float64)  # fp32 could not hold it
    assert int(strategy.all_gather(count).sum()) == 2**40 + 1
    assert int(strategy.reduce(torch.tensor(2, device="cuda"), reduce_op="max")) == 2
    strategy.barrier("named")


def test_objects_are_gathered(group: dist.ProcessGroup) -> None:
    found: list[Any] = [None]
    dist.all_gather_object(found, {"rank": 0, "path": Path("a")})
    assert found == [{"rank": 0, "path": Path("a")}]


def test_the_cards_generator_goes_on_where_it_was() -> None:
    state = rng_state()
    drawn = torch.rand(3, device="cuda"), torch.rand(3)
    restore_rng(state)
    assert all(torch.equal(a, b) for a, b in zip(drawn, (torch.rand(3, device="cuda"), torch.rand(3)), strict=True))


def test_a_cards_parameters_are_read_without_one(
    strategy: DDP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And optimizer states: written from the card, they lie on the CPU."""
    weight = Parameter(torch.randn(4, 4, device="cuda"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    strategy.optimizers = [optimizer]
    monkeypatch.setattr(DDP, "trained", lambda self: {"weight": weight})
    strategy.save_checkpoint({"global_step": 1}, tmp_path / "step-00000001.ckpt")
    read = read_values(tmp_path / "step-00000001.ckpt")["weight"]
    assert read.device.type == "cpu"
    assert torch.equal(read, weight.detach().cpu())
