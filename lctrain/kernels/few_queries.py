"""Attend with few queries to many keys, as in decoding, where reading the keys takes most of the time.

Shape legend: B batch, H query heads, K key-value heads, G query heads of a key-value head, L queries, S keys,
D head dim.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

FEW = 128  # fewer queries than this are few: compiling a kernel for each such length is not worth it

# Flash comes first: it divides the keys of a head among a card's processors, most of which the others leave idle.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class FewQueries(NamedTuple):
    """A mask [B, H or 1, L, S], True where a query attends; None where every query attends to every key."""

    mask: Tensor | None


def attend_few(q_BHLD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Return the output [B, H, L, D]. Query heads that share keys run as queries of one head, so a key is read once."""
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
