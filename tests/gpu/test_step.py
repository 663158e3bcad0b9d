"""On a card: the fast path of a step against the plain one, and its loss curve against the CPU and against fp32."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from lctrain.benchmark.measure import measure
from lctrain.config import compose
from lctrain.memory.savings import NOTHING, Savings
from lctrain.training.run import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ALL = replace(NOTHING, checkpoint_layers="all")
SAVINGS = {
    "checkpoint": ALL,
    "attention": replace(ALL, save_attention="all"),
    "tiles": replace(ALL, mlp_tile=512),
    "offload": replace(ALL, offload="all"),
    "heads": replace(ALL, kv_heads_at_a_time=1),
    "heads, attention": replace(ALL, kv_heads_at_a_time=1, save_attention="all", mlp_tile=512),
    "heads, inputs": replace(ALL, kv_heads_at_a_time=1, checkpoint_every=2, offload=1),
    "all together": Savings(
        checkpoint_layers=5, checkpoint_every=2, save_attention=2, offload=2, mlp_tile=512, kv_heads_at_a_time=0
    ),
}
LENGTH = 2048


def step(savings: Savings, *overrides: str) -> tuple[float, torch.Tensor]:
    """Loss and gradients of the tiny base, adapters drawn at random."""
    cfg = compose("train", ["tuning=lora", "model.dtype=bfloat16", "rope=linear", *overrides])
    torch.manual_seed(0)
    model: Any = replace(instantiate(cfg.model, _convert_="all"), memory=savings).build("cuda").train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=torch.Generator("cuda").manual_seed(len(name)))
    ids = torch.randint(0, 4096, (1, LENGTH), generator=torch.Generator().manual_seed(0)).cuda()
    batch = {"input_ids": ids, "labels": ids.roll(-1), "position_ids": torch.arange(LENGTH).cuda()[None]}
    with torch.autocast("cuda", torch.bfloat16):
        (total,) = instantiate(cfg.objective)(model, batch).values()
        loss = total / LENGTH
    loss.backward()
    gradients = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.norm(a - b) / torch.linalg.norm(b))


@pytest.mark.parametrize("attention", ["full", "shifted_sparse"])
@pytest.mark.parametrize("name", SAVINGS)
def test_savings_change_nothing(name: str, attention: str) -> None:
    plain, saved = step(NOTHING, f"attention={attention}"), step(SAVINGS[name], f"attention={attention}")
    if SAVINGS[name].kv_heads_at_a_time:  # bf16 sums over heads in parts
        assert saved[0] == pytest.approx(plain[0], rel=1e-3)
        assert relative(saved[1], plain[1]) < 2e-2
        return
    assert saved[0] == plain[0]
    assert relative(saved[1], plain[1]) < 1e-3  # a kernel may add up a gradient in another order


def test_inputs_on_the_host_take_what_is_planned() -> None:
    cfg = compose("benchmark", ["tuning=lora", "model.dtype=bfloat16", "trainer.accelerator=gpu", "rope=linear"])
    """A few hundred bytes are pinned besides, by whom is not known; an input is a mebibyte."""
    for num_inputs in (3, 1):  # what was pinned before is not counted again
        measured = measure(cfg, LENGTH, num_steps=1, warm_up=0, memory=replace(ALL, offload=num_inputs))
        assert measured.pinned_memory * 2**30 == pytest.approx(num_inputs * LENGTH * 256 * 2, abs=4096)


@pytest.mark.parametrize("tuning", ["lora", "longlora"])
def test_ligers_layers_agree_with_transformers(tuning: str) -> None:
    pytest.importorskip("liger_kernel")
    fused, plain = (step(NOTHING, f"tuning={tuning}", f"layer_kernel={name}") for name in ("liger", "plain"))
    assert fused[0] == pytest.approx(plain[0], rel=1e-3)
    assert relative(fused[1], plain[1]) < 2e-2


@pytest.mark.parametrize("tuning", ["lora"])
def test_fp8_is_close_to_bf16(tuning: str) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs fp8 tensor cores")
    small, plain = step(NOTHING, "precision=fp8"), step(NOTHING)
    assert small[0] == pytest.approx(plain[0], rel=1e-2)
    assert relative(small[1], plain[1]) < 0.2


def test_heads_at_a_time_by_parts_of_fp8_matrices() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs fp8 tensor cores")
    parts, whole = (step(replace(ALL, kv_heads_at_a_time=n), "precision=fp8") for n in (1, 0))
    assert parts[0] == pytest.approx(whole[0], rel=1e-2)  # a row's scale is that of the part's largest number
    assert relative(parts[1], whole[1]) < 0.1


def losses(run_dir: Path, num_steps: int, length: int, *overrides: str) -> torch.Tensor:
    """Of every step of the tiny base on a part of the standard library, rows of `length` tokens."""
    own = [f"run_dir={run_dir}", f"datamodule.cache_dir={run_dir.parent}/tokens", "logger=none", "data=text"]
    own.append(f"data.path={Path(asyncio.__file__).parent}")
    steps = [f"trainer.max_steps={num_steps}", "scheduler.num_warmup_steps=5", f"sequence_length={length}", "rope=none"]
    history = train(compose("train", [*own, *steps, *overrides])).history
    return torch.tensor([row["loss"] for row in history])


PATTERNS = {
    "full": ["attention=full"],
    "shifted_sparse": ["attention=shifted_sparse"],
    "streaming": ["attention=streaming", "attention.num_sink_tokens=4", "attention.recent_size=100"],
}


@pytest.mark.parametrize("attention", PATTERNS)
def test_fifty_steps_are_those_of_the_cpu(tmp_path: Path, attention: str) -> None:
    """The reference in fp32 on the CPU; sums in another order and bf16's 8 bits drift apart slowly.

    Everything trains: adapters are drawn on the device, and each has random numbers of its own.
    """
    same = [*PATTERNS[attention], "tuning=full", "optimizer.lr=1e-4", "datamodule.micro_batch_size=1"]
    plain = ["trainer.accelerator=cpu", "kernel=reference", "model.dtype=float32"]
    reference = losses(tmp_path / "cpu", 50, 256, *same, *plain)
    for dtype, tolerance in (("float32", 1e-3), ("bfloat16", 2e-2)):
        fast = losses(tmp_path / dtype, 50, 256, *same, "trainer.accelerator=gpu", f"model.dtype={dtype}")
        torch.testing.assert_close(fast, reference, rtol=tolerance, atol=0)


def test_loss_curves_of_bf16_and_fp8_stay_within_one_percent(tmp_path: Path) -> None:
    """Means over 20 steps of 200: bf16 beside fp32, fp8 beside bf16."""
    same = ["trainer.accelerator=gpu", "tuning=lora", "optimizer.lr=1e-3", "datamodule.micro_batch_size=8"]
    variants = {"fp32": ["model.dtype=float32"], "bf16": ["model.dtype=bfloat16"]}
    variants["fp8"] = [*variants["bf16"], "precision=fp8"]
    curves = {
        name: losses(tmp_path / name, 200, 512, *same, *changes).view(-1, 20).mean(1)
        for name, changes in variants.items()
    }
    torch.testing.assert_close(curves["bf16"], curves["fp32"], rtol=1e-2, atol=0)
    torch.testing.assert_close(curves["fp8"], curves["bf16"], rtol=1e-2, atol=0)
