"""One layer's cache in transformers' Cache: the new keys go to attention together with who keeps them.

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
from lctrain.errors import InputError
from lctrain.kernels.one_query import Buffer, attend_one

before: ContextVar[Tensor | None] = ContextVar("before", default=None)
"""While a step is captured: how many tokens came before, [1] on the device."""


class Fresh(NamedTuple):
    """In place of keys: the new ones, and the layer that knows those before. Only lctrain's attention takes it."""

    layer: "CacheLayer"
    keys: Tensor


@dataclass(frozen=True)
class Part:
    """The key-value heads [K] that one store keeps; None where it keeps all."""

    store: Store
    heads: Tensor | None


class CacheLayer(CacheLayerMixin):
    """Each head's keys and values are in one of the parts' stores, which also attends for it."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts = parts
        self.length = 0
        self._new = [part.store.twin() for part in parts]

    @property
    def keeps_all(self) -> bool:
        """Whether the installed method still decides what is seen."""
        return all(part.store.keeps_all for part in self.parts)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Stores allocate what they need when they are given keys."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keeps nothing yet: `attend` comes in the same layer, and knows the queries."""
        held = next((rows for part in self.parts if (rows := part.store.num_rows) is not None), None)
        if held not in (None, key_states.shape[0]):
            raise InputError(
                f"the cache holds {held} rows, not {key_states.shape[0]}; for several continuations of each, "
                "call cache.batch_repeat_interleave first, or start from a new cache"
            )
        return cast(Tensor, Fresh(self, key_states)), value_states

    @property
    def room(self) -> float:
        """How many tokens fit before a buffer must grow."""
        return min(part.store.room for part in self.parts)

    def attend(self, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, forward: Forward) -> Tensor:
        """[B, H, L, D]; the new keys are kept from here on."""
        captured, buffers = before.get(), self._buffers(k_BKLD, forward)
        if captured is not None:
            if buffers is None:
                raise InputError("what this cache does with a token changes as the text grows; use graphs=False")
            return self._attend_one(q_BHLD, k_BKLD, v_BKLD, buffers, captured, forward.scaling)
        start, self.length = self.length, self.length + k_BKLD.shape[2]
        if buffers is not None and k_BKLD.is_cuda:  # one kernel instead of a dozen
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
        """Where one token is stored, and all that it sees; None where it is not as simple as that."""
        if k_BKLD.shape[2] != 1 or not forward.plain or k_BKLD.requires_grad:  # that kernel has no backward
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
        """As if everything were kept: masks tell which of all tokens are padding."""
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
        """Assisted generation announces here that it will take tokens back."""
        if not self.is_croppable:
            raise InputError("what was forgotten can't be brought back: assisted generation needs cache=full")

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens, given as a negative number."""
        if tokens_to_remove:
            self.activate_past_recording()
            self.length -= abs(tokens_to_remove)
            for part in self.parts:
                part.store.crop(self.length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, for as many continuations."""
        for part in self.parts:
            part.store.select(torch.arange(part.store.num_rows or 0).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows, in this order."""
        for part in self.parts:
            part.store.select(indices)


def is_installed(model: PreTrainedModel) -> bool:
    """Whether `model` runs lctrain's attention, which alone knows this kind of layer."""
    return str(model.config.get_text_config()._attn_implementation).startswith("lctrain_")


def require_installed(model: PreTrainedModel) -> None:
    """InputError unless `model` runs lctrain's attention."""
    if not is_installed(model):
        raise InputError(
            f"{type(model).__name__} attends by {model.config.get_text_config()._attn_implementation!r}; "
            "lctrain.model.serve.load, or lctrain.model.install.install, makes it ask this cache"
        )


def require_full_layers(config: Any) -> None:
    """InputError unless every layer attends to all tokens by itself, without a window or a state."""
    text = config.get_text_config()
    windowed = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    kinds = getattr(text, "layer_types", None) or [windowed]
    if others := sorted({kind for kind in kinds if kind != "full_attention"}):
        raise InputError(f"{text.model_type} has layers of {', '.join(others)}; their heads can't be made to stream")
    if getattr(text, "attn_logit_softcapping", None):
        raise InputError(f"{text.model_type} caps attention scores, which streaming heads can't; use cache=full")
