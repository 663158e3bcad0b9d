"""FlexAttention's BlockMask from bounds of the mask over blocks: the L×S grid is never evaluated.

Shape legend: B batch, H query heads, M blocks along one side, N along the other, W entries of a list.
"""

from collections.abc import Iterator
from math import ceil, log2

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from lctrain.kernels.interval import Blocks
from lctrain.kernels.mask import Mask

BLOCK = 128  # tokens: what FlexAttention's kernels load at once
MAX_LIST_BYTES = 2**28  # of the lists of keys; those of queries, for the backward, take about as much again
MAX_PAIRS = 2**22  # of blocks bounded at once: 16 MiB for each temporary of 4 bytes


def block_mask(mask: Mask, kv_block: int = BLOCK) -> BlockMask:
    """Blocks that `mask` leaves empty are skipped, those it fills are computed without asking it.

    Takes (L / 128) · (S / 128) bounds, twice. Blocks of queries grow where the lists of their keys would be too large
    (1M tokens and heads that differ). A mask that is more than arithmetic is evaluated pair by pair, compiled.
    """
    mask = mask.padded(BLOCK)
    sizes = (BLOCK, kv_block)
    if not _has_bounds(mask, sizes):
        return create_block_mask(
            mask.mask_mod(), mask.batch, mask.num_heads, mask.q_length, mask.kv_length,
            device=str(mask.device), BLOCK_SIZE=sizes, _compile=True,
        )  # fmt: skip
    while (excess := _bytes(counts := _counts(mask, sizes, -2)) / MAX_LIST_BYTES) > 1:
        sizes = (sizes[0] * 2 ** ceil(log2(excess)), kv_block)
    keys, queries = _lists(mask, sizes, -2, counts), _lists(mask, sizes, -1, _counts(mask, sizes, -1))
    lengths = (mask.q_length, mask.kv_length)
    return BlockMask(lengths, *keys, *queries, BLOCK_SIZE=sizes, mask_mod=mask.mask_mod())


def _has_bounds(mask: Mask, sizes: tuple[int, int]) -> bool:
    lengths = (mask.q_length, mask.kv_length)
    q, kv = (
        Blocks(range(1), size=sizes[axis], length=lengths[axis], axis=axis, device=mask.device) for axis in (-2, -1)
    )
    try:
        mask.bound(q, kv)
    except (TypeError, AttributeError, IndexError):
        return False
    return True


def _counts(mask: Mask, sizes: tuple[int, int], axis: int) -> Tensor:
    """How many partial and how many full blocks each block along `axis` has on the other side, [2, B, H, M]."""
    parts = [
        torch.stack([kind.sum(-1, dtype=torch.int32) for kind in kinds]) for _, *kinds in _kinds(mask, sizes, axis)
    ]
    return torch.cat(parts, dim=-1)


def _bytes(counts: Tensor) -> int:
    """Of the lists, which are as wide as their longest."""
    return counts[0].numel() * int(counts.amax(dim=(1, 2, 3)).sum()) * 4


def _lists(mask: Mask, sizes: tuple[int, int], axis: int, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each block along `axis`, those on the other side: number and list of the partial, then of the full ones."""
    widths = counts.amax(dim=(1, 2, 3)).clamp(min=2).tolist()  # torch would compile anew for lists of none or one
    partial, full = (counts.new_zeros(*counts.shape[1:], width) for width in widths)
    for rows, *kinds in _kinds(mask, sizes, axis):
        for kind, table in zip(kinds, (partial, full), strict=True):
            table[:, :, rows] = _places(kind, table.shape[-1])
    for table in (partial, full):  # how many entries a batch's documents need must not compile anything anew
        torch._dynamo.maybe_mark_dynamic(table, 3)
    return counts[0], partial, counts[1], full


def _kinds(mask: Mask, sizes: tuple[int, int], axis: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which blocks are partial and which full, [B, H, M, N], some blocks along `axis` at a time."""
    num_blocks = [ceil(mask.q_length / sizes[0]), ceil(mask.kv_length / sizes[1])]
    along, across = num_blocks if axis == -2 else num_blocks[::-1]
    step = max(1, MAX_PAIRS // (mask.batch * mask.num_heads * across))
    for start in range(0, along, step):
        ranges = [range(n) for n in num_blocks]
        ranges[axis] = range(start, min(start + step, along))
        q = Blocks(ranges[0], size=sizes[0], length=mask.q_length, axis=-2, device=mask.device)
        kv = Blocks(ranges[1], size=sizes[1], length=mask.kv_length, axis=-1, device=mask.device)
        surely, possibly = (x if axis == -2 else x.mT for x in mask.bound(q, kv))
        yield slice(start, start + step), possibly & ~surely, surely


def _places(kind: Tensor, width: int) -> Tensor:
    """Where each row is True, in order, [B, H, M, W]; the rest is 0."""
    slots = torch.where(kind, kind.cumsum(-1) - 1, width)
    places = torch.arange(kind.shape[-1], dtype=torch.int32, device=kind.device).expand(kind.shape)
    table = places.new_zeros(*kind.shape[:-1], width + 1)
    return table.scatter_(-1, slots, places)[..., :width]
