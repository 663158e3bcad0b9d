"""Where attention plugs into transformers: its AttentionInterface and AttentionMaskInterface, nothing else.

Shape legend: B batch, H query heads, K key-value heads, L queries, S keys, D head dim.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from lctrain.attention.base import Layout, MaskedAttention
from lctrain.errors import InputError
from lctrain.kernels.base import Kernel, MaskMod, MaskShape
from lctrain.kernels.choose import choose
from lctrain.memory.recall import attend_once
from lctrain.parallel.ulysses import Ulysses

_serial = itertools.count()
_SCORE_TERMS = ("s_aux", "sinks", "position_bias", "indices", "block_indices")  # learned sinks, biases, chosen keys


@dataclass(frozen=True)
class _Mask:
    """What transformers knows of a forward's mask, and what was prepared from it: one per forward and layer type."""

    batch: int
    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    mask_function: Callable[..., Any]  # causality, the model's own window
    padding_BS: Tensor | None  # True where a key is a token
    positions_BS: Tensor | None  # of keys among the row's tokens; given with padding
    prepared: dict[Any, Any] = field(default_factory=dict)

    def positions(self, position_ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of queries and keys inside their documents, [B or 1, L] and [B or 1, S]."""
        if self.positions_BS is not None:
            kv = self.positions_BS
        elif self.q_length == self.kv_length:
            return position_ids_BL, position_ids_BL
        else:
            kv = torch.arange(self.kv_length, device=position_ids_BL.device)[None] + self.kv_offset
        first = self.q_offset - self.kv_offset
        return kv[:, first : first + self.q_length], kv

    def documents(self, position_ids_BL: Tensor) -> Tensor | None:
        """The number of each token's document, where a row of the forward holds more than one; they are packed
        where positions do not go on by one."""
        if self.q_length != self.kv_length or self.padding_BS is not None:
            return None
        starts = position_ids_BL.diff(dim=1, prepend=position_ids_BL[:, :1] - 1) != 1
        return starts.cumsum(1) if bool(starts.any()) else None

    def combine(self, visible: MaskMod, position_ids_BL: Tensor, documents_BL: Tensor | None) -> MaskMod:
        """`visible`, documents, padding and all that the architecture asks for, over indices of this forward."""
        q_pos, kv_pos = self.positions(position_ids_BL)
        one_row = q_pos.shape[0] == 1
        padding, q_offset, kv_offset = self.padding_BS, self.q_offset, self.kv_offset

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            row = b * 0 if one_row else b
            mask: Tensor = self.mask_function(b, h, q_idx + q_offset, kv_idx + kv_offset)
            mask = mask & visible(b, h, q_pos[row, q_idx], kv_pos[row, kv_idx])
            if documents_BL is not None:
                mask = mask & (documents_BL[row, q_idx] == documents_BL[row, kv_idx])
            if padding is not None:  # a padding query sees padding, so that no row of the softmax is empty
                mask = mask & (padding[b, q_idx + (q_offset - kv_offset)] == padding[b, kv_idx])
            return mask

        return mask_mod


@dataclass(frozen=True)
class _Installed:
    """One method on one kernel, as the pair of functions that transformers calls.

    With `ulysses`, a forward's tokens are this rank's part of the row, and masks are those of the whole row.
    """

    method: MaskedAttention
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
        """What `AttentionMaskInterface` calls once per forward and layer type."""
        padding = positions = None
        if attention_mask is not None and not bool(attention_mask.all()):
            unfilled = max(0, kv_offset + kv_length - attention_mask.shape[-1])  # of a preallocated cache
            tokens = nn.functional.pad(attention_mask.bool(), (0, unfilled))
            keys = slice(kv_offset, kv_offset + kv_length)  # a cache with a window has dropped those before
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
        **extra: Any,
    ) -> tuple[Tensor, None]:
        """What `AttentionInterface` calls in every layer; returns [B, L, H, D]."""
        if unknown := [name for name in _SCORE_TERMS if extra.get(name) is not None]:
            raise InputError(f"{type(module).__name__} has {unknown[0]} in its softmax, which no kernel here computes")
        if dropout:
            raise InputError("this attention has no dropout; set attention_dropout to 0 in the model's config")
        scaling = q_BHLD.shape[-1] ** -0.5 if scaling is None else scaling

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            prepared = self._prepared(mask, module, q, k, position_ids)
            run = partial(self.kernel.attend, prepared=prepared, scaling=scaling, softcap=softcap)
            return attend_once(run, q, k, v)

        if self.ulysses is None:
            return attention(q_BHLD, k_BKSD, v_BKSD).transpose(1, 2), None
        return self.ulysses.attend(attention, q_BHLD, k_BKSD, v_BKSD).transpose(1, 2), None

    def _prepared(self, mask: _Mask, module: nn.Module, q: Tensor, k: Tensor, position_ids: Tensor | None) -> Any:
        """What the kernel made of the mask of this layer's group; None for plain causal attention."""
        position_ids, documents = self._row(mask, position_ids)
        plain = mask.mask_function is causal_mask_function and mask.padding_BS is None and documents is None
        if plain and self.method.plain_causal and mask.q_length == mask.kv_length:
            return None
        if position_ids is None:
            raise InputError(f"{type(module).__name__} hands no position_ids to its attention; lctrain can't mask it")
        group = self.method.layer_group(module.layer_idx)  # type: ignore[arg-type]
        if ("mask", group) not in mask.prepared:
            num_ranks, rank = (1, 0) if self.ulysses is None else (self.ulysses.size, self.ulysses.rank)
            layout = Layout(
                length=mask.kv_length,
                num_attention_heads=q.shape[1] * num_ranks,
                num_key_value_heads=q.shape[1] * num_ranks // module.num_key_value_groups,  # type: ignore[operator]
                layer_idx=module.layer_idx,  # type: ignore[arg-type]
                first_head=q.shape[1] * rank,
                decoding=mask.q_length != mask.kv_length,
            )
            shape = MaskShape(
                batch=1 if plain and position_ids.shape[0] == 1 else mask.batch,
                num_heads=q.shape[1] if self.method.heads_differ(layout) else 1,
                num_key_value_groups=q.shape[1] // k.shape[1],
                q_length=mask.q_length,
                kv_length=mask.kv_length,
                device=q.device,
                dtype=q.dtype,
            )
            combined = mask.combine(self.method.visible(layout), position_ids, documents)
            mask.prepared["mask", group] = self.kernel.prepare(combined, shape)
        return mask.prepared["mask", group]

    def _row(self, mask: _Mask, position_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Positions and documents of the whole row, found once per forward."""
        if position_ids is None:
            return None, None
        if "row" not in mask.prepared:
            position_ids = position_ids if self.ulysses is None else self.ulysses.gather(position_ids)
            mask.prepared["row"] = position_ids, mask.documents(position_ids)
        row: tuple[Tensor, Tensor | None] = mask.prepared["row"]
        return row


def install(
    model: PreTrainedModel, method: MaskedAttention, kernel: str = "auto", ulysses: Ulysses | None = None
) -> str:
    """Make `model` attend by `method` on `kernel` from its next forward on.

    Registers a name of its own in transformers' interfaces, so models with different methods live side by side.
    Under `ulysses` its forwards take this rank's part of each row. Returns the name of the kernel that was chosen.
    Raises InputError if the kernel can't run, or the model's attention does not go through the interface.
    """
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    name, chosen = choose(kernel, softcap=softcap, device_type=model.device.type)
    installed = _Installed(method, chosen, ulysses)
    implementation = f"lctrain_{next(_serial)}"
    AttentionInterface.register(implementation, installed.attend)
    AttentionMaskInterface.register(implementation, installed.make_mask)
    model.set_attn_implementation(implementation)
    if model.config.get_text_config()._attn_implementation != implementation:
        raise InputError(
            f"{type(model).__name__} does not use transformers' attention interface; {method} can't be installed"
        )
    return name
