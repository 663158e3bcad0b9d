"""Transformer-XL's recurrence over segments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lctrain.attention.base import Call, Cost, Extra, Layout, MaskedAttention, require_positive
from lctrain.errors import InputError
from lctrain.kernels.mask import Local, PositionMask


@dataclass(frozen=True, kw_only=True)
class TransformerXL(MaskedAttention):
    """Segments, each with a memory of the tokens before it (Transformer-XL, Dai et al., arXiv:1901.02860, §3.2).

    Segments of `segment_size` tokens are counted from the document's begin. A token sees its own segment up to itself
    and the last `memory_size` tokens before the segment, in one softmax. With `detach`, no gradient flows into keys and
    values of the memory, as in the paper. All segments of a row are computed at once, and each layer's memory is what
    the layer below made of the tokens before, so that the reach grows by `memory_size` with every layer, as it does
    segment by segment.

    Deviations: the paper stops gradients at the memory's hidden states, so that its key and value projections still
    learn from the memory; here they learn from a token's own segment alone. The paper adds relative encodings and two
    learned biases to the scores; here the model's own rotary positions, which are relative, stay as they are.

    Cost: without `detach`, and wherever no gradients are computed, this is a static pattern. With it, the same pairs
    are computed over a detached and a live copy of all keys, and their mask is built pair by pair in each layer.
    """

    segment_size: int
    memory_size: int
    detach: bool

    def __post_init__(self) -> None:
        require_positive(self, segment_size=self.segment_size)
        if self.memory_size < 0:
            raise InputError(f"attention.memory_size must not be negative, got {self.memory_size}")

    def visible(self, layout: Layout) -> PositionMask:
        size, memory_size = self.segment_size, self.memory_size
        return lambda b, h, q_pos, kv_pos: kv_pos >= q_pos // size * size - memory_size

    def local(self, layout: Layout, head: int) -> Local | None:
        return None if self.memory_size else Local(group=self.segment_size)

    def attend(self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, call: Call) -> Tensor:
        learns = torch.is_grad_enabled() and (k_BKSD.requires_grad or v_BKSD.requires_grad)
        if not (self.detach and self.memory_size and learns):
            return call.run(self, q_BHLD, k_BKSD, v_BKSD)
        size, positions_BS, documents_BS = self.segment_size, call.rows.positions_BS, call.rows.documents_BS
        num_tokens = call.rows.first_query + call.rows.num_queries  # what follows them in a cache is uninitialised

        def own(b: Any, h: Any, q: Any, kv: Any) -> Any:
            return positions_BS[b, kv] // size == positions_BS[b, q] // size

        def remembered(b: Any, h: Any, q: Any, kv: Any) -> Any:
            begin, position = positions_BS[b, q] // size * size, positions_BS[b, kv]
            within = (position < begin) & (position >= begin - self.memory_size)
            return within & (documents_BS[b, kv] == documents_BS[b, q])

        k_BKED, v_BKED = (x[:, :, :num_tokens].detach() for x in (k_BKSD, v_BKSD))
        memory = Extra(k_BKED=k_BKED, v_BKED=v_BKED, visible=remembered)
        return call.over(own, q_BHLD, k_BKSD, v_BKSD, memory)

    def parts(self, layout: Layout) -> Sequence[tuple[MaskedAttention | Cost, int]]:
        if not (self.detach and self.memory_size):
            return super().parts(layout)
        position = torch.arange(layout.length)
        begin = position // self.segment_size * self.segment_size
        seen = position + 1 - begin + begin.clamp(max=self.memory_size)
        return [(Cost(keys=float(seen.double().mean())), layout.num_attention_heads)]

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:
        if self.segment_size >= lengths[-1]:
            raise InputError(
                f"attention.segment_size={self.segment_size} is all of the longest sequence ({lengths[-1]}); "
                "use attention=full"
            )
