"""Install an attention method into a transformers model, by AttentionInterface and AttentionMaskInterface alone.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from lctrain.attention.base import Attention, Layout, MaskedAttention
from lctrain.attention.full import FullAttention
from lctrain.attention.identity import value
from lctrain.cache.base import Forward
from lctrain.cache.layer import Fresh
from lctrain.errors import InputError
from lctrain.kernels.base import Demand, Kernel
from lctrain.kernels.choose import choose
from lctrain.kernels.mask import Mask
from lctrain.memory.recall import attend_once
from lctrain.parallel.ulysses import Ulysses

Sides = tuple[Tensor, Tensor]  # one table for queries [B or 1, L] and one for keys [B or 1, S]

_serial = itertools.count()
_FULL = "_full"  # suffix of a method's name that means full attention on the same kernel
_SCORE_TERMS = ("s_aux", "sinks", "position_bias", "indices", "block_indices")  # learned sinks, biases, chosen keys


@dataclass(frozen=True)
class _Mask:
    """A forward's mask as transformers describes it, and what was prepared from it: one per forward and layer type."""

    batch: int
    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    mask_function: Callable[..., Any]  # causality, the model's own window
    padding_BS: Tensor | None  # True where a key is a token
    positions_BS: Tensor | None  # positions of keys among the row's tokens; given with padding
    prepared: dict[Any, Any] = field(default_factory=dict)

    def tables(self, position_ids_BL: Tensor) -> tuple[Sides | None, Sides | None]:
        """Return the tables of positions in the document and of document numbers, for queries and keys.

        The first is None if positions are the indices in the row, the second if each row is one document. A document
        begins where a position is not the one before plus one.
        """
        if self.padding_BS is not None:
            assert self.positions_BS is not None
            # Padding is a document of its own, so that its queries see padding and no softmax is over nothing.
            return self._sides(self.positions_BS), self._sides(self.padding_BS)
        if self.q_length != self.kv_length:
            return None, None
        row = torch.arange(self.kv_length, device=position_ids_BL.device)
        begins = position_ids_BL.diff(dim=1, prepend=position_ids_BL[:, :1] - 1) != 1
        packed, indices = torch.stack((begins.any(), (position_ids_BL == row).all())).tolist()  # one sync per forward
        positions = None if indices else self._sides(position_ids_BL)
        return positions, self._sides(begins.cumsum(1)) if packed else None

    def _sides(self, table_BS: Tensor) -> Sides:
        first = self.q_offset - self.kv_offset
        table_BS = table_BS.to(torch.int32)
        return table_BS[:, first : first + self.q_length], table_BS


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
    ) -> _Mask:
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
        return _Mask(batch_size, q_length, kv_length, int(q_offset), kv_offset, mask_function, padding, positions)

    def attend(
        self,
        module: nn.Module,
        q_BHLD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        mask: _Mask,
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

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layout = self._layout(mask, module, q, first_head)

            def run(pattern: MaskedAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                prepared = self._prepared(pattern, mask, module, layout, q, k, position_ids)
                attend = partial(self.kernel.attend, prepared=prepared, scaling=scaling, softcap=softcap)
                return attend_once(attend, q, k, v)

            return self.method.attend(module, q, k, v, layout, run)

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
        mask: _Mask,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Let the layer's cache store the new keys and values and attend, by this method if it keeps all keys."""
        if not fresh.layer.keeps_all and not isinstance(self.method, FullAttention):
            raise InputError(f"this cache decides itself what heads see, instead of {self.method}; use attention=full")
        if self.ulysses is not None:
            raise InputError("sequence parallelism is for training: it has no cache")
        causal = mask.mask_function is causal_mask_function and mask.padding_BS is None
        plain = causal and softcap is None and isinstance(self.method, FullAttention)
        forward = Forward(
            tokens_BS=mask.padding_BS,
            attend=attention,
            kernel=self.kernel,
            scaling=scaling,
            plain=plain,
            shared=mask.prepared,
        )
        return fresh.layer.attend(q_BHLD, fresh.keys, v_BKLD, forward)

    def _layout(self, mask: _Mask, module: nn.Module, q: Tensor, first_head: int) -> Layout:
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

    def _prepared(
        self,
        pattern: MaskedAttention,
        mask: _Mask,
        module: nn.Module,
        layout: Layout,
        q: Tensor,
        k: Tensor,
        position_ids: Tensor | None,
    ) -> Any:
        """Return what the kernel prepared from a pattern's mask, shared by all layers and heads with the same mask."""
        head_groups = pattern.head_groups(layout, q.shape[1])
        told = value(pattern)
        key = (told, pattern.layer_group(layout.layer_idx), head_groups)
        if told is not None and key in mask.prepared:
            return mask.prepared[key]
        last = mask.q_offset + mask.q_length == mask.kv_offset + mask.kv_length  # queries and keys end together
        plain = mask.mask_function is causal_mask_function and mask.padding_BS is None and last
        heads = range(layout.first_head, layout.first_head + len(head_groups))
        local = pattern.local_heads(layout, heads) if plain else None
        if position_ids is None and not (local and all(one.is_causal(mask.kv_length) for one in local)):
            raise InputError(f"{type(module).__name__} hands no position_ids to its attention; it can't be masked")
        positions, documents = self._tables(mask, position_ids)
        prepared = self.kernel.prepare(
            Mask(
                q_length=mask.q_length,
                kv_length=mask.kv_length,
                num_heads=len(head_groups),
                num_key_value_groups=q.shape[1] // k.shape[1],
                head_dim=q.shape[-1],
                device=q.device,
                dtype=q.dtype,
                allowed=mask.mask_function,
                visible=pattern.visible(layout),
                q_offset=mask.q_offset,
                kv_offset=mask.kv_offset,
                positions=positions,
                documents=documents,
                num_rows=mask.batch,
                local=local,
            )
        )
        if told is not None:
            mask.prepared[key] = prepared
        return prepared

    def _tables(self, mask: _Mask, position_ids: Tensor | None) -> tuple[Sides | None, Sides | None]:
        """Return the tables of positions and documents of the whole row, computed once per forward."""
        if position_ids is None:
            return None, None
        if "tables" not in mask.prepared:
            position_ids = position_ids if self.ulysses is None else self.ulysses.gather(position_ids)
            mask.prepared["tables"] = mask.tables(position_ids)
        tables: tuple[Sides | None, Sides | None] = mask.prepared["tables"]
        return tables


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
    if method.learned():
        with model.device:
            for module in attention_modules(model):
                method.equip(module, model.config.get_text_config())
    return name


@contextmanager
def full_attention(model: PreTrainedModel) -> Iterator[None]:
    """Make a model that `install` changed use full attention, on the same kernel, inside this context."""
    own = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation(f"{own}{_FULL}")
    try:
        yield
    finally:
        model.set_attn_implementation(own)
