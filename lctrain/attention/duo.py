"""DuoAttention: full and streaming attention, mixed by a gate per key-value head, to learn which heads retrieve."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lctrain.attention.base import Attention, Bounds, Call, Layout, MaskedAttention
from lctrain.attention.full import FullAttention
from lctrain.attention.streaming import StreamingAttention
from lctrain.errors import InputError

GATES = "duo.head_gates"  # the parameter of an attention module, [key-value heads]


class Gates(nn.Module):
    """The gates of one layer, and how they mix the outputs of its two branches."""

    def __init__(self, num_key_value_heads: int, initial_gate: float) -> None:
        super().__init__()
        self.head_gates = nn.Parameter(torch.full((num_key_value_heads,), initial_gate, dtype=torch.float32))

    def forward(self, full_BHLD: Tensor, streaming_BHLD: Tensor, layout: Layout) -> Tensor:
        """Return both branches mixed, for the heads that are here."""
        gates_H = self.head_gates.repeat_interleave(layout.num_attention_heads // layout.num_key_value_heads)
        gates_h = gates_H[layout.first_head : layout.first_head + full_BHLD.shape[1]]
        mix = _compiled() if full_BHLD.is_cuda else _mix
        mixed_BLHD: Tensor = mix(gates_h, full_BHLD.transpose(1, 2), streaming_BHLD.transpose(1, 2))
        return mixed_BLHD.transpose(1, 2)


def _mix(gates_H: Tensor, full_BLHD: Tensor, streaming_BLHD: Tensor) -> Tensor:
    # In the gate's fp32: its gradient is the difference of two sums over all tokens, which bf16 would round away.
    gates = gates_H[:, None]
    return (gates * full_BLHD + (1 - gates) * streaming_BLHD).to(full_BLHD.dtype)


@cache
def _compiled() -> Any:
    return torch.compile(_mix, fullgraph=True)  # one pass over memory each way instead of four and ten, in fp32


@dataclass(frozen=True, kw_only=True)
class DuoAttention(Attention):
    """α · full + (1 − α) · streaming, with a gate α per layer and key-value head (Xiao et al., arXiv:2410.10819, §2.3).

    Both come from one q, k and v, each at its own cost. A streaming head sees the document's first `num_sink_tokens`
    and the last `recent_size` tokens, itself included. With every α at 1 this is full attention to the bit.
    `initial_gate` is what gates start from, `clamp` keeps them within 0 and 1 after each optimizer step.

    Deviations: the authors' streaming kernel counts blocks of 128 tokens, this one tokens; they clamp before a step
    instead of after it, so that what they write can lie outside.
    """

    num_sink_tokens: int
    recent_size: int
    initial_gate: float
    clamp: bool

    def __post_init__(self) -> None:
        if not 0 <= self.initial_gate <= 1:
            raise InputError(f"attention.initial_gate={self.initial_gate} must be within 0 and 1")
        _ = self.streaming  # refuses its sizes

    @cached_property
    def full(self) -> MaskedAttention:
        """Return full attention, the branch of retrieval heads."""
        return FullAttention()

    @cached_property
    def streaming(self) -> MaskedAttention:
        """Return attention to sinks and recent tokens, the branch of streaming heads."""
        return StreamingAttention(num_sink_tokens=self.num_sink_tokens, recent_size=self.recent_size)

    def attend(self, module: nn.Module, q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, call: Call) -> Tensor:
        full, streaming = (call.run(pattern, q_BHLD, k_BKSD, v_BKSD) for pattern in (self.full, self.streaming))
        mixed: Tensor = module.get_submodule(self.name)(full, streaming, call.layout)
        return mixed

    def parts(self, layout: Layout) -> Sequence[tuple[MaskedAttention, int]]:
        return [(self.full, layout.num_attention_heads), (self.streaming, layout.num_attention_heads)]

    def child(self, config: PreTrainedConfig, layout: Layout) -> nn.Module:
        return Gates(config.num_key_value_heads, self.initial_gate)

    def bounds(self) -> Mapping[str, Bounds]:
        return {"head_gates": (0.0, 1.0)} if self.clamp else {}

    def check(self, config: PreTrainedConfig, lengths: list[int]) -> None:
        if self.num_sink_tokens + self.recent_size >= lengths[-1]:
            raise InputError(
                f"attention.num_sink_tokens + attention.recent_size = {self.num_sink_tokens + self.recent_size} is all "
                f"of the longest sequence ({lengths[-1]}): streaming heads would see what full attention sees"
            )
