"""Adapt stores to one layer of transformers' Cache; the layer is passed to attention together with the new keys.

Shape legend: B batch, H query heads, K key-value heads, L new tokens, D head dim.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from lctrain.cache.base import Forward, Store
from lctrain.decode.one_query import Buffer, attend_one
from lctrain.errors import InputError

before: ContextVar[Tensor | None] = ContextVar("before", default=None)
"""The number of earlier tokens while a step is captured, [1] on the device."""


class Fresh(NamedTuple):
    """The new keys and the layer that keeps the earlier ones, passed in place of keys to lctrain's attention only."""

    layer: "CacheLayer"
    keys: Tensor


@dataclass(frozen=True)
class Part:
    """The key-value heads [K] that one store keeps; None where it keeps all."""

    store: Store
    heads: Tensor | None


class CacheLayer(CacheLayerMixin):
    """A layer's cache in parts: each head's keys and values are in the store of one part, which also attends for it."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts = parts
        self.length = 0
        self._new = [part.store.twin() for part in parts]

    @property
    def decides(self) -> bool:
        """Return whether a store decides what is seen, so that the installed method can't."""
        return any(part.store.decides for part in self.parts)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: stores allocate their buffers when they get the first keys."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys as `Fresh`, and the new values, without keeping them: `attend` does, with the queries.

        Raises InputError if the number of rows differs from that of the rows kept.
        """
        held = next((rows for part in self.parts if (rows := part.store.num_rows) is not None), None)
        if held not in (None, key_states.shape[0]):
            raise InputError(
                f"the cache holds {held} rows, not {key_states.shape[0]}; for several continuations of each, "
                "call cache.batch_repeat_interleave first, or start from a new cache"
            )
        return cast(Tensor, Fresh(self, key_states)), value_states

    @property
    def room(self) -> float:
        """Return the number of tokens that fit before a buffer must grow."""
        return min(part.store.room for part in self.parts)

    def attend(self, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, forward: Forward) -> Tensor:
        """Return the output [B, H, L, D], and keep the new keys and values.

        Raises InputError while a step is captured, if the cache's work on a token changes as the text grows.
        """
        captured, buffers = before.get(), self._buffers(k_BKLD, forward)
        if captured is not None:
            if buffers is None:
                raise InputError("what this cache does with a token changes as the text grows; use graphs=False")
            return self._attend_one(q_BHLD, k_BKLD, v_BKLD, buffers, captured, forward.scaling)
        start, self.length = self.length, self.length + k_BKLD.shape[2]
        if buffers is not None and k_BKLD.is_cuda:  # runs one kernel instead of a dozen
            if "before" not in forward.shared:
                forward.shared["before"] = torch.full((1,), start, device=k_BKLD.device)
            return self._attend_one(q_BHLD, k_BKLD, v_BKLD, buffers, forward.shared["before"], forward.scaling)
        if len(self.parts) == 1:
            return self.parts[0].store.attend(q_BHLD, k_BKLD, v_BKLD, start, forward)
        q_BKGLD = q_BHLD.unflatten(1, (k_BKLD.shape[1], -1))
        out_BKGLD = torch.empty_like(q_BKGLD)
        for part in self.parts:
            assert part.heads is not None
            heads = part.heads.to(k_BKLD.device)
            q, k, v = (x.index_select(1, heads) for x in (q_BKGLD, k_BKLD, v_BKLD))
            out = part.store.attend(q.flatten(1, 2), k, v, start, forward)
            out_BKGLD.index_copy_(1, heads, out.unflatten(1, (heads.numel(), -1)))
        return out_BKGLD.flatten(1, 2)

    def _buffers(self, k_BKLD: Tensor, forward: Forward) -> list[Buffer] | None:
        """Return the buffers that store one new token and hold all that it sees; None where `attend_one` can't run."""
        if k_BKLD.shape[2] != 1 or not forward.plain or k_BKLD.requires_grad:  # attend_one has no backward
            return None
        buffers = []
        for part in self.parts:
            heads = None if part.heads is None else part.heads.to(k_BKLD.device)
            like_BKLD = k_BKLD if heads is None else k_BKLD[:, : heads.numel()]
            if (buffer := part.store.buffer(like_BKLD, self.length)) is None:
                return None
            buffers.append(buffer._replace(heads=heads))
        return buffers

    def _attend_one(
        self,
        q_BHLD: Tensor,
        k_BKLD: Tensor,
        v_BKLD: Tensor,
        buffers: list[Buffer],
        before_1: Tensor,
        scaling: float,
    ) -> Tensor:
        out_BHLD = torch.empty_like(q_BHLD)
        attend_one(q_BHLD, k_BKLD, v_BKLD, buffers, before_1, out_BHLD, scaling)
        return out_BHLD

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (number of all tokens, 0), whatever is kept: masks tell which of all tokens are padding."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length = 0
        for part, new in zip(self.parts, self._new, strict=True):
            part.store.become(new.twin())

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return all(part.store.can_crop for part in self.parts)

    def activate_past_recording(self) -> None:
        """Raise InputError if tokens can't be taken back; assisted generation calls this before it starts."""
        if not self.is_croppable:
            raise InputError("what was forgotten can't be brought back: assisted generation needs cache=full")

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `tokens_to_remove` tokens, a negative number. Raises InputError if that can't be done."""
        if tokens_to_remove:
            self.activate_past_recording()
            self.length -= abs(tokens_to_remove)
            for part in self.parts:
                part.store.crop(self.length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, for as many continuations."""
        for part in self.parts:
            part.store.select(torch.arange(part.store.num_rows or 0).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows, in this order."""
        for part in self.parts:
            part.store.select(indices)


def is_installed(model: PreTrainedModel) -> bool:
    """Return whether `model` runs lctrain's attention, the only one that accepts a `CacheLayer`."""
    return str(model.config.get_text_config()._attn_implementation).startswith("lctrain_")


def require_installed(model: PreTrainedModel) -> None:
    """Raise InputError unless `model` runs lctrain's attention."""
    if not is_installed(model):
        raise InputError(
            f"{type(model).__name__} attends by {model.config.get_text_config()._attn_implementation!r}; "
            "lctrain.model.serve.load, or lctrain.model.install.install, makes it ask this cache"
        )


def require_full_layers(config: Any) -> None:
    """Raise InputError unless every layer attends to all tokens, without a window, a state or a softcap."""
    text = config.get_text_config()
    windowed = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    kinds = getattr(text, "layer_types", None) or [windowed]
    if others := sorted({kind for kind in kinds if kind != "full_attention"}):
        raise InputError(
            f"{text.model_type} has layers of {', '.join(others)}, and this cache serves full attention only; "
            "use cache=full"
        )
    if getattr(text, "attn_logit_softcapping", None):
        raise InputError(f"{text.model_type} caps attention scores, which this cache can't; use cache=full")
