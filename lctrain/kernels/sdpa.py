"""Run torch's scaled_dot_product_attention on the keys that the mask leaves visible."""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.kernels.base import Demand, Kernel
from lctrain.kernels.few_queries import attend_few
from lctrain.kernels.mask import Mask

# Tiles of 512 queries skip most keys that a pattern hides, and still occupy all cores of a CPU.
TILE = 512


class Tile(NamedTuple):
    """One call: queries `q` of `q_heads` see nothing outside keys `kv` of `kv_heads`; `bias` is 0 or -inf inside."""

    q_heads: slice
    kv_heads: slice
    q: slice
    kv: slice
    bias: Tensor


class SDPAKernel(Kernel):
    """A kernel that computes plain causal attention in one call, and a pattern in tiles of queries.

    A tile attends to all keys from the first to the last that its queries see. So a window or a group costs only the
    keys it sees, even where the backend has no sparsity (CPU).
    """

    @classmethod
    def refusal(cls, demand: Demand) -> str | None:
        return "can't cap attention scores as this model does; use kernel=auto" if demand.softcap is not None else None

    def prepare(self, mask: Mask) -> list[Tile] | None:
        if mask.causal and (mask.square or mask.q_length == 1):
            return None
        offset = mask.kv_length - mask.q_length  # causal: query i sees no key after i + offset
        tiles = []
        for start in range(0, mask.q_length, TILE):
            q = slice(start, min(start + TILE, mask.q_length))
            attends = mask.evaluate(q, slice(0, q.stop + offset))
            for q_heads, kv_heads in _head_runs(attends, mask.num_key_value_groups):
                kv = slice(*_hull(attends[:, q_heads]))
                visible = attends[:, q_heads, :, kv]
                bias = torch.zeros(visible.shape, dtype=mask.dtype, device=mask.device)
                tiles.append(Tile(q_heads, kv_heads, q, kv, bias.masked_fill_(~visible, float("-inf"))))
        return tiles

    def attend(
        self,
        q_BHLD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        prepared: list[Tile] | None,
        *,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        if prepared is None and q_BHLD.shape[2] == 1:  # sees all keys
            return attend_few(q_BHLD, k_BKSD, v_BKSD, None, scaling)
        if prepared is None:
            return F.scaled_dot_product_attention(
                q_BHLD, k_BKSD, v_BKSD, is_causal=True, scale=scaling, enable_gqa=True
            )
        rows: dict[int, list[Tensor]] = {}
        for tile in prepared:
            k, v = (x[:, tile.kv_heads, tile.kv] for x in (k_BKSD, v_BKSD))
            q = q_BHLD[:, tile.q_heads, tile.q]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=tile.bias, scale=scaling, enable_gqa=True)
            rows.setdefault(tile.q.start, []).append(out)
        return torch.cat([torch.cat(heads, dim=1) for heads in rows.values()], dim=2)


def _head_runs(mask: Tensor, groups: int) -> Iterator[tuple[slice, slice]]:
    """Yield (query heads, key-value heads) of each run of neighbouring key-value heads that see the same `_hull`."""
    if mask.shape[1] == 1:
        yield slice(None), slice(None)
        return
    hulls = [_hull(heads) for heads in mask.split(groups, dim=1)]
    for _, run in groupby(range(len(hulls)), key=hulls.__getitem__):
        heads = list(run)
        first, last = heads[0], heads[-1] + 1
        yield slice(first * groups, last * groups), slice(first, last)


def _hull(mask: Tensor) -> tuple[int, int]:
    """Return the first key that any query sees, and one past the last."""
    seen = mask.flatten(0, 2).any(0).nonzero()
    return int(seen[0]), int(seen[-1]) + 1
