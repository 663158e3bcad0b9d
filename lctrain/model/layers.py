"""Replace modules of a tuned model by faster ones that keep the names of the parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lctrain.errors import InputError
from lctrain.matmul.fp8 import FP8Linear
from lctrain.model.rotary_attention import RotaryAttention

# Transformers' norm classes by what they compute: x / rms(x) · (weight + offset), rounded as in Llama or as in Gemma.
LLAMA_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
GEMMA_NORMS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")
ROTARY_ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention")  # nothing between projection and rotation
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP", "Gemma3MLP")


def uses_liger(layer_kernel: str, device_type: str) -> bool:
    """Return whether norms and MLPs run Liger's kernels; raise InputError for a choice that can't run."""
    if layer_kernel not in ("auto", "liger", "plain"):
        raise InputError(f"layer_kernel={layer_kernel} is none of auto, liger, plain")
    possible = device_type == "cuda" and find_spec("liger_kernel") is not None
    if layer_kernel == "liger" and not possible:
        raise InputError("layer_kernel=liger needs CUDA and liger-kernel (pip install 'lctrain[gpu]')")
    return possible and layer_kernel != "plain"


class GatedMLP(nn.Module):
    """An MLP that computes down(act(gate(x)) · up(x)), with the activation and product in one kernel."""

    def __init__(self, mlp: nn.Module, gated: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.add_module(name, getattr(mlp, name))
        self._gated = gated

    def forward(self, x: Tensor) -> Tensor:
        """Return the replaced module's output, [..., D]."""
        return self.down_proj(self._gated(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return,operator]


class Norm(nn.Module):
    """A norm that computes x / rms(x) · (weight + offset) in one kernel, rounded as in Llama or as in Gemma."""

    def __init__(self, norm: nn.Module, run: Callable[..., Tensor], *, gemma: bool) -> None:
        super().__init__()
        self.weight = norm.weight
        self._run, self._gemma = run, gemma
        self._eps = norm.eps if gemma else norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Return the replaced module's output, [..., D]."""
        # Not in place for Gemma: the backward would overwrite a gradient that Gemma's layers may still need.
        casting, in_place = ("gemma", False) if self._gemma else ("llama", True)
        return self._run(x, self.weight, self._eps, float(self._gemma), casting, in_place)


@dataclass(frozen=True, kw_only=True)
class LayerKernels:
    """The functions that fused layers call: Liger's, or in a plan their fakes."""

    rms_norm: Callable[..., Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    geglu: Callable[[Tensor, Tensor], Tensor]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def liger() -> LayerKernels:
    """Return Liger's functions (Hsu et al., arXiv:2410.10989); they need triton."""
    from liger_kernel.transformers import functional

    return LayerKernels(
        rms_norm=functional.liger_rms_norm,
        swiglu=functional.liger_swiglu,
        geglu=functional.liger_geglu,
        rope=functional.liger_rope,
    )


def fuse(model: PreTrainedModel, kernels: LayerKernels) -> None:
    """Replace the norms, the gated MLPs and the rotary attention modules of the known model families."""
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
    """Return whether `part_heads` can reproduce the model's attention modules."""
    attentions = [getattr(layer, "self_attn", None) for layer in model.get_decoder().layers]
    return all(isinstance(a, RotaryAttention) or type(a).__name__ in ROTARY_ATTENTIONS for a in attentions)


def part_heads(model: PreTrainedModel, num_layers: int, kv_heads_at_a_time: int) -> None:
    """Make the attention of the first `num_layers` layers compute `kv_heads_at_a_time` key-value heads at a time.

    Raises InputError if the model's attention does more than rotate between projections and attention.
    """
    if not parts_heads(model):
        raise InputError(f"memory.kv_heads_at_a_time: {type(model).__name__}'s attention can't be parted; set it to 0")
    for layer in model.get_decoder().layers[:num_layers]:
        rope = getattr(layer.self_attn, "rope", apply_rotary_pos_emb)
        layer.self_attn = RotaryAttention(layer.self_attn, rope, kv_heads_at_a_time)


def quantize_frozen(model: PreTrainedModel) -> None:
    """Hold the decoder's frozen matrices in fp8. Raises InputError if there are none."""
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
    """Cast the output of embeddings that train in fp32 to `dtype`: else layers would read and keep twice the bytes."""
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.to(dtype))
