"""What a tuned model's layers are replaced by to run faster: modules for modules, parameters keep their names."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lctrain.errors import InputError
from lctrain.kernels.fp8 import FP8Linear
from lctrain.model.rotary_attention import RotaryAttention

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


def parts_heads(model: PreTrainedModel) -> bool:
    """Whether `part_heads` knows all that the model's attention does."""
    attentions = [getattr(layer, "self_attn", None) for layer in model.get_decoder().layers]
    return all(isinstance(a, RotaryAttention) or type(a).__name__ in ROTARY_ATTENTIONS for a in attentions)


def part_heads(model: PreTrainedModel, num_layers: int, kv_heads_at_a_time: int) -> None:
    """Let the attention of the first layers compute some heads at a time. InputError where it does more than rotate."""
    if not parts_heads(model):
        raise InputError(f"memory.kv_heads_at_a_time: {type(model).__name__}'s attention can't be parted; set it to 0")
    for layer in model.get_decoder().layers[:num_layers]:
        rope = getattr(layer.self_attn, "rope", apply_rotary_pos_emb)
        layer.self_attn = RotaryAttention(layer.self_attn, rope, kv_heads_at_a_time)


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
