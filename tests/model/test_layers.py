"""Layers that are exchanged for faster ones compute the same: shown with plain functions in place of Liger's."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from lctrain.attention.duo import DuoAttention
from lctrain.errors import InputError
from lctrain.matmul.fp8 import FP8Linear
from lctrain.model import layers
from lctrain.model.install import attention_modules, full_attention, install
from lctrain.model.tuning import FullTuning, LoRATuning


def rms_norm(x, weight, eps, offset, casting, in_place):
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return ((weight.float() + offset) * normed).to(x.dtype)


def rope(q, k, cos, sin):
    def rotate(x):
        left, right = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]

    return rotate(q), rotate(k)


PLAIN = layers.LayerKernels(
    rms_norm=rms_norm,
    swiglu=lambda gate, up: F.silu(gate) * up,
    geglu=lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    rope=rope,
)
EXCHANGED = {
    "llama": {"Norm", "GatedMLP", "RotaryAttention"},
    "mistral": {"Norm", "GatedMLP", "RotaryAttention"},
    "qwen2": {"Norm", "GatedMLP", "RotaryAttention"},
    "qwen3": {"Norm", "GatedMLP"},
    "gemma": {"Norm", "GatedMLP"},
    "gemma2": {"Norm", "GatedMLP"},
    "gemma3_text": {"Norm", "GatedMLP"},
}


@pytest.mark.parametrize("family", EXCHANGED)
def test_fused_layers_compute_what_they_stand_for(tiny, ids, family):
    plain = tiny(family)
    fused = deepcopy(plain)
    layers.fuse(fused, PLAIN)
    assert {type(module).__name__ for module in fused.modules()} >= EXCHANGED[family]
    assert dict(fused.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    torch.testing.assert_close(fused(ids(2, 20)).logits, plain(ids(2, 20)).logits)


def test_fused_layers_keep_what_an_attention_method_brought(tiny, ids):
    plain = tiny("llama")
    install(plain, DuoAttention(num_sink_tokens=2, recent_size=4, initial_gate=0.75, clamp=True), "sdpa")
    fused = deepcopy(plain)
    layers.fuse(fused, PLAIN)
    assert dict(fused.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    gradients = []
    for model in (fused, plain):
        model(ids(2, 20)).logits.square().sum().backward()
        gradients.append([p.grad for name, p in model.named_parameters() if name.endswith("head_gates")])
    torch.testing.assert_close(*gradients)
    assert len(attention_modules(fused)) == 2
    with full_attention(fused), full_attention(plain):
        torch.testing.assert_close(fused(ids(2, 20)).logits, plain(ids(2, 20)).logits)


def test_layer_kernels_that_cannot_run_are_refused():
    assert not layers.uses_liger("auto", "cpu")
    assert not layers.uses_liger("plain", "cuda")
    with pytest.raises(InputError, match="layer_kernel=liger needs CUDA"):
        layers.uses_liger("liger", "cpu")
    with pytest.raises(InputError, match="none of auto, liger, plain"):
        layers.uses_liger("fast", "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_computes_what_peft_does(tiny, ids, dtype):
    targets = ["q_proj", "o_proj", "up_proj"]
    model = tiny("llama").to(dtype)
    theirs = get_peft_model(deepcopy(model), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    tuning = LoRATuning(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, trainable=[])
    ours = tuning.apply(deepcopy(model))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    theirs.load_state_dict(ours.state_dict())
    both = []
    for tuned in (ours, theirs):
        logits = tuned(input_ids=ids(2, 12)).logits.float()
        logits.square().mean().backward()
        gradients = [p.grad.flatten().float() for p in tuned.parameters() if p.requires_grad]
        both.append(torch.cat([logits.detach().flatten(), *gradients]))
    # PEFT multiplies in fp32 what we multiply in bf16, which keeps 8 bits: 1e-2 over a sum
    assert torch.linalg.norm(both[0] - both[1]) / torch.linalg.norm(both[1]) < (
        1e-6 if dtype == torch.float32 else 2e-2
    )


def test_fp8_is_close_forward_and_backward():
    """Two roundings to 3 bits of mantissa, each at most 2**-4: a few percent over a sum."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=True).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 32, 64, dtype=torch.bfloat16, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    expected, got = linear(x), FP8Linear(linear)(same)
    direction = torch.randn_like(expected)
    expected.backward(direction)
    got.backward(direction)
    for a, b in ((got, expected), (same.grad, x.grad)):
        assert 0 < torch.linalg.norm((a - b).float()) / torch.linalg.norm(b.float()) < 0.06


def test_only_frozen_matrices_of_the_decoder_are_in_fp8(tiny):
    model = tiny("llama")
    tuned = LoRATuning(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj"], trainable=["up_proj"]).apply(
        model
    )
    layers.quantize_frozen(tuned.get_base_model())
    held = {name.split(".")[-1] for name, module in tuned.named_modules() if isinstance(module, FP8Linear)}
    assert held == {"base_layer", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"}
    with pytest.raises(InputError, match="this tuning trains all"):
        layers.quantize_frozen(FullTuning().apply(tiny("llama")))
    with pytest.raises(InputError, match="multiples of 16"):
        FP8Linear(torch.nn.Linear(24, 16))
