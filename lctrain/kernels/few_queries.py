"""Attention of few queries to many keys, as in decoding: reading the keys is all that costs.

Shape legend: B batch, H query heads, K key-value heads, G query heads of one of those, L queries, S keys, D head dim.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

FEW = 128  # fewer queries than this; a compiled kernel for each length is not worth it

# Flash divides the keys of a head among the processors of a card; the others leave most of them idle.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class FewQueries(NamedTuple):
    """A mask [B, H or 1, L, S], True where a query attends; None where all do to all keys."""

    mask: Tensor | None


def attend_few(q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """[B, H, L, D]. Query heads that share keys become queries of one head, which reads each key once."""
    num_kv_heads, length = k_BKSD.shape[1], q_BHLD.shape[2]
    groups = q_BHLD.shape[1] // num_kv_heads
    q = q_BHLD.unflatten(1, (num_kv_heads, groups)).flatten(2, 3)  # [B, K, G·L, D]
    if mask is not None and mask.shape[1] == 1:
        mask = mask.repeat(1, 1, groups, 1)
    elif mask is not None:
        mask = mask.unflatten(1, (num_kv_heads, groups)).flatten(2, 3)
    with sdpa_kernel(_BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k_BKSD, v_BKSD, attn_mask=mask, scale=scaling)
    out_BHLD: Tensor = out.unflatten(2, (groups, length)).flatten(1, 2)
    return out_BHLD
