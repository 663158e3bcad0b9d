"""On a card: the fast path of a step against the plain one, and its loss curve against the CPU and against fp32."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from lctrain.config import compose
from lctrain.memory.savings import NOTHING, Savings

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
        loss = instantiate(cfg.objective)(model, batch) / LENGTH
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


def losses(run: Any, num_steps: int, *overrides: str) -> torch.Tensor:
    history = run(f"trainer.max_steps={num_steps}", "tuning=lora", "optimizer.lr=3e-3", *overrides).history
    return torch.tensor([row["loss"] for row in history])


@pytest.mark.parametrize("attention", ["full", "shifted_sparse", "streaming"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 2e-2)])
def test_fifty_steps_are_those_of_the_cpu(
    run: Any, tmp_path: Any, attention: str, dtype: str, tolerance: float
) -> None:
    """The reference in fp32 on the CPU; sums in another order and bf16's 8 bits drift apart slowly."""
    pattern = f"attention={attention}"
    reference = losses(run, 50, pattern, "trainer.accelerator=cpu", f"run_dir={tmp_path}/cpu")
    fast = losses(run, 50, pattern, "trainer.accelerator=gpu", f"model.dtype={dtype}", f"run_dir={tmp_path}/gpu")
    torch.testing.assert_close(fast, reference, rtol=tolerance, atol=0)


@pytest.mark.parametrize("changes", [["model.dtype=bfloat16"], ["model.dtype=bfloat16", "precision=fp8"]])
def test_a_loss_curve_stays_within_one_percent_of_fp32(run: Any, tmp_path: Any, changes: list[str]) -> None:
    """Means over 20 steps of 200, on the tiny base."""
    tiny_base = ["model.path=${asset:tiny-base}", "trainer.accelerator=gpu", "sequence_length=512", "rope=none"]
    exact = losses(run, 200, *tiny_base, f"run_dir={tmp_path}/exact")
    curve = losses(run, 200, *tiny_base, *changes, f"run_dir={tmp_path}/curve")
    torch.testing.assert_close(curve.view(-1, 20).mean(1), exact.view(-1, 20).mean(1), rtol=1e-2, atol=0)
