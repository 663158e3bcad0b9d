"""Store one new token among the keys and values kept so far, and attend from it to all of them.

The number of tokens before it is read on the device, so that one captured step runs for every token.

Shape legend: B batch, H query heads, K key-value heads, P key-value heads of a buffer, G query heads of a key-value
head, L = 1 token, N slots of a buffer, D head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lctrain.kernels.few_queries import attend_few


class Buffer(NamedTuple):
    """Keys and values [B, P, N, D]. The first `num_sinks` tokens stay in their slots, later ones replace the oldest."""

    keys: Tensor
    values: Tensor
    num_sinks: int
    heads: Tensor | None = None  # [P], the key-value heads that the buffer keeps; None: all

    @property
    def num_turns(self) -> int:
        """Return the number of slots that are not for sinks."""
        return self.keys.shape[2] - self.num_sinks


def slot_of(position: Tensor, num_sinks: int, num_turns: int) -> Tensor:
    """Return the slot in which the token at each position of its row is kept."""
    return torch.minimum(position, num_sinks + (position - num_sinks) % num_turns)


def attend_one(
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    v_BKLD: Tensor,
    buffers: Sequence[Buffer],
    before_1: Tensor,
    out_BHLD: Tensor,
    scaling: float,
) -> None:
    """Store one token, and write its attention into `out`, at the query heads of the buffers only."""
    if q_BHLD.is_cuda:
        from lctrain.decode.split_keys import launch  # needs triton

        launch(q_BHLD, k_BKLD, v_BKLD, buffers, before_1, out_BHLD, scaling)
    else:
        reference(q_BHLD, k_BKLD, v_BKLD, buffers, before_1, out_BHLD, scaling)


def reference(
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    v_BKLD: Tensor,
    buffers: Sequence[Buffer],
    before_1: Tensor,
    out_BHLD: Tensor,
    scaling: float,
) -> None:
    """Compute `attend_one` by torch's own operations."""
    for buffer in buffers:
        heads = torch.arange(k_BKLD.shape[1], device=k_BKLD.device) if buffer.heads is None else buffer.heads
        k, v = (x.index_select(1, heads) for x in (k_BKLD, v_BKLD))
        q_BPGLD = q_BHLD.unflatten(1, (k_BKLD.shape[1], -1)).index_select(1, heads)
        slot_1 = slot_of(before_1, buffer.num_sinks, buffer.num_turns)
        buffer.keys.index_copy_(2, slot_1, k)
        buffer.values.index_copy_(2, slot_1, v)
        seen_N = torch.arange(buffer.keys.shape[2], device=k.device) <= before_1
        # Slots that no token was stored in yet may contain any number, even NaN.
        k, v = (kept.where(seen_N[:, None], 0) for kept in (buffer.keys, buffer.values))
        out = attend_few(q_BPGLD.flatten(1, 2), k, v, seen_N[None, None, None], scaling)
        out_BHLD.unflatten(1, (k_BKLD.shape[1], -1)).index_copy_(1, heads, out.view(q_BPGLD.shape))
