"""What a tuned model's layers are replaced by to run faster: modules for modules, parameters keep their names."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from lctrain.errors import InputError
from lctrain.kernels.fp8 import FP8Linear

# By what the classes of transformers compute: x / rms(x) · (weight + offset), rounded as in Llama or in Gemma.
LLAMA_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
GEMMA_NORMS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")
ROTARY_ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention")  # nothing between projection and rotation
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP")


def uses_liger(layer_kernel: str, device_type: str) -> bool:
    """Whether norms and MLPs run Liger's kernels; InputError for a choice that can't run."""
    if layer_kernel not in ("auto", "liger", "plain"):
        raise InputError(f"layer_kernel={layer_kernel} is none of auto, liger, plain")
    possible = device_type == "cuda" and find_spec("liger_kernel") is not None
    if layer_kernel == "liger" and not possible:
        raise InputError("layer_kernel=liger needs CUDA and liger-kernel (pip install 'lctrain[gpu]')")
    return possible and layer_kernel != "plain"


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)) with the product in one kernel."""

    def __init__(self, mlp: nn.Module, gated: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.add_module(name, getattr(mlp, name))
        self._gated = gated

    def forward(self, x: Tensor) -> Tensor:
        """As the module it stands for, [..., D]."""
        return self.down_proj(self._gated(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return,operator]


class RotaryAttention(nn.Module):
    """Projections, rotation of queries and keys in one kernel, transformers' attention interface, projection."""

    q_proj: Callable[[Tensor], Tensor]
    k_proj: Callable[[Tensor], Tensor]
    v_proj: Callable[[Tensor], Tensor]
    o_proj: Callable[[Tensor], Tensor]

    def __init__(self, attention: nn.Module, rope: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        for name, parameter in attention.named_parameters(recurse=False):  # what an attention method brought
            self.register_parameter(name, parameter)
        self.config: Any = attention.config
        self.layer_idx, self.scaling = attention.layer_idx, attention.scaling
        self.num_key_value_groups, self.head_dim = attention.num_key_value_groups, attention.head_dim
        self._rope = rope

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the module it stands for, by the names it is called with: [B, L, D]."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self._rope(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = AttentionInterface()[self.config._attn_implementation]
        out_BLHD, _ = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out_BLHD.flatten(2)), None


class Norm(nn.Module):
    """x / rms(x) · (weight + offset) in one kernel, as Llama or as Gemma rounds it."""

    def __init__(self, norm: nn.Module, run: Callable[..., Tensor], *, gemma: bool) -> None:
        super().__init__()
        self.weight = norm.weight
        self._run, self._gemma = run, gemma
        self._eps = norm.eps if gemma else norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """As the module it stands for, [..., D]."""
        # In place, the backward writes over a gradient that Gemma's layers may still need.
        casting, in_place = ("gemma", False) if self._gemma else ("llama", True)
        return self._run(x, self.weight, self._eps, float(self._gemma), casting, in_place)


@dataclass(frozen=True, kw_only=True)
class LayerKernels:
    """Liger's functions, or what stands in for them in a plan."""

    rms_norm: Callable[..., Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    geglu: Callable[[Tensor, Tensor], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def liger() -> LayerKernels:
    """Hsu et al., arXiv:2410.10989; needs triton."""
    from liger_kernel.transformers import functional

    return LayerKernels(
        rms_norm=functional.liger_rms_norm,
        swiglu=functional.liger_swiglu,
        geglu=functional.liger_geglu,
        rope=functional.liger_rope,
    )


def fuse(model: PreTrainedModel, kernels: LayerKernels) -> None:
    """Replace the norms, the gated MLPs and what surrounds the rotation of queries and keys, in the known families."""
    silu = getattr(model.config.get_text_config(), "hidden_act", None) == "silu"
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind in LLAMA_NORMS + GEMMA_NORMS:
            model.set_submodule(name, Norm(module, kernels.rms_norm, gemma=kind in GEMMA_NORMS))
        elif kind in GATED_MLPS:
            model.set_submodule(name, GatedMLP(module, kernels.swiglu if silu else kernels.geglu))
        elif kind in ROTARY_ATTENTIONS:
            model.set_submodule(name, RotaryAttention(module, kernels.rope))


def quantize_frozen(model: PreTrainedModel) -> None:
    """Hold the decoder's matrices that do not train in fp8. InputError if there are none."""
    decoder = model.get_decoder()
    frozen = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and ".lora_" not in name
    ]
    if not frozen:
        raise InputError("precision=fp8 is for matrices that do not train, and this tuning trains all; use tuning=lora")
    for name, module in frozen:
        decoder.set_submodule(name, FP8Linear(module))


def keep_stream_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what embeddings that train in fp32 give out, or every layer would read and keep twice the bytes."""
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.to(dtype))
