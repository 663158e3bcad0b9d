"""Install an attention method into a transformers model, by AttentionInterface and AttentionMaskInterface alone.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from lctrain.attention.base import Attention, Layout
from lctrain.attention.full import FullAttention
from lctrain.cache.base import Forward
from lctrain.cache.layer import Fresh
from lctrain.errors import InputError
from lctrain.kernels.base import Demand, Kernel
from lctrain.kernels.choose import choose
from lctrain.model.call import ForwardMask, LayerCall
from lctrain.parallel.ulysses import Ulysses

_serial = itertools.count()
_FULL = "_full"  # suffix of a method's name that means full attention on the same kernel
_SCORE_TERMS = ("s_aux", "sinks", "position_bias", "indices", "block_indices")  # learned sinks, biases, chosen keys


@dataclass(frozen=True)
class _Installed:
    """An attention method on a kernel, as the pair of functions that transformers calls.

    With `ulysses`, a forward's tokens are this rank's part of the row, while masks are those of the whole row.
    """

    method: Attention
    kernel: Kernel
    ulysses: Ulysses | None

    def make_mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = causal_mask_function,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> ForwardMask:
        """Return the mask; `AttentionMaskInterface` calls this once per forward and layer type."""
        padding = positions = None
        if attention_mask is not None and not bool(attention_mask.all()):
            unfilled = max(0, kv_offset + kv_length - attention_mask.shape[-1])  # free slots of a preallocated cache
            tokens = nn.functional.pad(attention_mask.bool(), (0, unfilled))
            keys = slice(kv_offset, kv_offset + kv_length)  # a cache with a window has dropped earlier keys
            padding, positions = tokens[:, keys], (tokens.cumsum(-1) - 1).clamp(min=0)[:, keys]
        if self.ulysses is not None:
            if padding is not None or q_length != kv_length:
                raise InputError("sequence parallelism is for training: rows without padding, no cache")
            q_length, kv_length = q_length * self.ulysses.size, kv_length * self.ulysses.size
        return ForwardMask(batch_size, q_length, kv_length, int(q_offset), kv_offset, mask_function, padding, positions)

    def attend(
        self,
        module: nn.Module,
        q_BHLD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        mask: ForwardMask,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        position_ids: Tensor | None = None,
        first_head: int = 0,
        **extra: Any,
    ) -> tuple[Tensor, None]:
        """Return the output [B, L, H, D]; `AttentionInterface` calls this in every layer.

        `q` may hold only a part of the heads, from `first_head` on.
        """
        if unknown := [name for name in _SCORE_TERMS if extra.get(name) is not None]:
            raise InputError(f"{type(module).__name__} has {unknown[0]} in its softmax, which no kernel here computes")
        if dropout:
            raise InputError("this attention has no dropout; set attention_dropout to 0 in the model's config")
        scaling = q_BHLD.shape[-1] ** -0.5 if scaling is None else scaling

        def attention(q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
            call = LayerCall(
                layout=self._layout(mask, module, q_BHLD, first_head),
                kernel=self.kernel,
                mask=mask,
                module=module,
                position_ids=position_ids,
                ulysses=self.ulysses,
                scaling=scaling,
                softcap=softcap,
            )
            return self.method.attend(module, q_BHLD, k_BKSD, v_BKSD, call)

        if isinstance(k_BKSD, Fresh):
            return self._cached(attention, q_BHLD, k_BKSD, v_BKSD, mask, scaling, softcap).transpose(1, 2), None
        if self.ulysses is None:
            return attention(q_BHLD, k_BKSD, v_BKSD).transpose(1, 2), None
        return self.ulysses.attend(attention, q_BHLD, k_BKSD, v_BKSD).transpose(1, 2), None

    def _cached(
        self,
        attention: Callable[[Tensor, Tensor, Tensor], Tensor],
        q_BHLD: Tensor,
        fresh: Fresh,
        v_BKLD: Tensor,
        mask: ForwardMask,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Let the layer's cache store the new keys and values and attend, by this method unless a store decides."""
        if fresh.layer.decides and not isinstance(self.method, FullAttention):
            raise InputError(f"this cache decides itself what heads see, instead of {self.method}; use attention=full")
        if self.ulysses is not None:
            raise InputError("sequence parallelism is for training: it has no cache")
        plain = mask.is_plain and softcap is None and isinstance(self.method, FullAttention)
        forward = Forward(
            tokens_BS=mask.padding_BS,
            attend=attention,
            kernel=self.kernel,
            scaling=scaling,
            plain=plain,
            shared=mask.shared,
        )
        return fresh.layer.attend(q_BHLD, fresh.keys, v_BKLD, forward)

    def _layout(self, mask: ForwardMask, module: nn.Module, q: Tensor, first_head: int) -> Layout:
        """Return the whole layer's layout, of which `q` holds this rank's share of the heads from `first_head` on."""
        config: Any = module.config
        return Layout(
            length=mask.kv_length,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            layer_idx=module.layer_idx,  # type: ignore[arg-type]
            first_head=first_head + (0 if self.ulysses is None else q.shape[1] * self.ulysses.rank),
            decoding=mask.q_length != mask.kv_length,
            device=q.device,
        )


def demand(config: PreTrainedConfig, dtype: torch.dtype, device_type: str) -> Demand:
    """Return what a model of this config demands of a kernel; `dtype` is that of its weights."""
    text = config.get_text_config()
    return Demand(
        device_type=device_type,
        dtype=dtype,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        softcap=getattr(text, "attn_logit_softcapping", None),
    )


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that call transformers' attention interface, one per layer.

    Raises InputError if they are not found.
    """
    modules = [
        m for m in model.get_decoder().modules() if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")
    ]
    if len(modules) != model.config.get_text_config().num_hidden_layers:
        raise InputError(
            f"{type(model).__name__}: {len(modules)} of its modules attend with key-value heads, not a layer each"
        )
    return modules


def install(
    model: PreTrainedModel, method: Attention, kernel: str | Kernel = "auto", ulysses: Ulysses | None = None
) -> str:
    """Make `model` attend by `method` on `kernel` (a name or an instance) from its next forward on.

    Registers a new name in transformers' interfaces, so that models with different methods can coexist, and another
    name for full attention on the same kernel, which `full_attention` uses. Adds the method's own parameters. Under
    `ulysses`, the model's forwards take this rank's part of each row. Returns the name of the chosen kernel. Raises
    InputError if the kernel can't run, or if the model's attention does not use the interface.
    """
    if isinstance(kernel, Kernel):
        name, chosen = type(kernel).__name__, kernel
    else:
        name, chosen = choose(kernel, demand(model.config, model.dtype, model.device.type))
    implementation = f"lctrain_{next(_serial)}"
    for suffix, each in (("", method), (_FULL, FullAttention())):
        installed = _Installed(each, chosen, ulysses)
        AttentionInterface.register(implementation + suffix, installed.attend)
        AttentionMaskInterface.register(implementation + suffix, installed.make_mask)
    model.set_attn_implementation(implementation)
    if model.config.get_text_config()._attn_implementation != implementation:
        raise InputError(
            f"{type(model).__name__} does not use transformers' attention interface; {method} can't be installed"
        )
    equip(model, method)
    return name


def equip(model: PreTrainedModel, method: Attention) -> None:
    """Add to every attention module what `method` learns, as a child module of the method's name."""
    if not method.learns:
        return
    config: Any = model.config.get_text_config()
    with model.device:
        for module in attention_modules(model):
            layout = Layout(
                length=config.max_position_embeddings,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_key_value_heads,
                layer_idx=module.layer_idx,  # type: ignore[arg-type]
            )
            if (child := method.child(config, layout)) is not None:
                module.add_module(method.name, child)


@contextmanager
def full_attention(model: PreTrainedModel) -> Iterator[None]:
    """Make a model that `install` changed use full attention, on the same kernel, inside this context."""
    own = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation(f"{own}{_FULL}")
    try:
        yield
    finally:
        model.set_attn_implementation(own)
