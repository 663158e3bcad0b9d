"""Build FlexAttention's BlockMask from bounds of the mask over blocks, without evaluating the L×S grid.

Shape legend: B batch, H query heads, M blocks of one side, N of the other, W entries of a list.
"""

from math import ceil, log2, prod

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from lctrain.kernels.interval import Blocks
from lctrain.kernels.mask import Mask

BLOCK = 128  # tokens that FlexAttention's kernels load at once
MAX_GRID = 2**27  # pairs of blocks, of two truth values each: 256 MiB
MAX_LIST_BYTES = 5 * 2**27  # for the lists of keys by query, and of queries by key for the backward: 640 MiB
MAX_PAIRS = 2**22  # pairs of blocks bounded at once: temporaries of a few times 16 MiB


def block_mask(mask: Mask, kv_block: int = BLOCK) -> BlockMask:
    """Build the BlockMask of `mask`: empty blocks are skipped, and full blocks computed without the mask function.

    This takes (L / 128) · (S / 128) bounds. Blocks of queries are made larger where that would be too many, or the
    lists too long (1M tokens and heads that differ). A mask that is made of more than arithmetic has no bounds: a
    compiled function evaluates it pair by pair.
    """
    mask = mask.padded(BLOCK)
    sizes = (BLOCK, kv_block)
    if not _has_bounds(mask, sizes):
        return create_block_mask(
            mask.mask_mod(), mask.batch, mask.num_heads, mask.q_length, mask.kv_length,
            device=str(mask.device), BLOCK_SIZE=sizes, _compile=True,
        )  # fmt: skip
    while prod(_shape(mask, sizes)) > MAX_GRID:
        sizes = (sizes[0] * 2, kv_block)
    while (excess := _list_bytes(grid := _grid(mask, sizes)) / MAX_LIST_BYTES) > 1 and sizes[0] < mask.q_length:
        sizes = (sizes[0] * 2 ** ceil(log2(excess)), kv_block)
    keys, queries = _lists(grid), _lists(grid.mT)
    lengths = (mask.q_length, mask.kv_length)
    return BlockMask(lengths, *keys, *queries, BLOCK_SIZE=sizes, mask_mod=mask.mask_mod())


def _shape(mask: Mask, sizes: tuple[int, int]) -> tuple[int, int, int, int]:
    return mask.batch, mask.num_heads, ceil(mask.q_length / sizes[0]), ceil(mask.kv_length / sizes[1])


def _blocks(mask: Mask, sizes: tuple[int, int], axis: int, numbers: Tensor | None = None) -> Blocks:
    if numbers is None:
        numbers = torch.arange(_shape(mask, sizes)[axis], device=mask.device)
    return Blocks(numbers, size=sizes[axis], length=(mask.q_length, mask.kv_length)[axis], axis=axis)


def _has_bounds(mask: Mask, sizes: tuple[int, int]) -> bool:
    first = torch.zeros(1, dtype=torch.int32, device=mask.device)
    try:
        mask.bound(_blocks(mask, sizes, -2, first), _blocks(mask, sizes, -1, first))
    except (TypeError, AttributeError, IndexError):
        return False
    return True


def _grid(mask: Mask, sizes: tuple[int, int]) -> Tensor:
    """Return which blocks are partial, then which are full: [2, B, H, M, N], queries by keys."""
    q, kv = (_blocks(mask, sizes, axis) for axis in (-2, -1))
    grid = torch.empty(2, *_shape(mask, sizes), dtype=torch.bool, device=mask.device)
    for rows in q.numbers.split(_at_once(grid[0, :, :, 0].numel())):
        surely, possibly = mask.bound(_blocks(mask, sizes, -2, rows), kv)
        grid[0, :, :, rows], grid[1, :, :, rows] = possibly & ~surely, surely
    if mask.documents is not None:  # bound_parts bounds every part of one block with every part of the other: nine
        for rows in q.mixed(mask.documents[0]).split(_at_once(9 * grid[0, :, :, 0].numel())):
            grid[0, :, :, rows] &= mask.bound_parts(_blocks(mask, sizes, -2, rows), kv)
        for columns in kv.mixed(mask.documents[1]).split(_at_once(9 * grid[0, :, :, :, 0].numel())):
            grid[0, :, :, :, columns] &= mask.bound_parts(q, _blocks(mask, sizes, -1, columns))
    return grid


def _at_once(pairs_each: int) -> int:
    return max(1, MAX_PAIRS // pairs_each)


def _counts(grid: Tensor) -> Tensor:
    """Return how many blocks each row of `grid` [2, B, H, M, N] has.

    The sum is taken in parts, because torch converts truth values to integers first.
    """
    rows = grid.split(_at_once(grid[..., 0, :].numel()), dim=-2)
    return torch.cat([part.sum(-1, dtype=torch.int32) for part in rows], dim=-1)


def _list_bytes(grid: Tensor) -> int:
    """Return the bytes of all lists, each as wide as the longest."""
    return sum(4 * counts.numel() * int(counts.amax()) for counts in (_counts(grid), _counts(grid.mT)))


def _lists(grid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return, for each row of `grid` [2, B, H, M, N], the number and list of its partial blocks, then of its full ones.

    Numbers are [B, H, M], lists [B, H, M, W].
    """
    counts = _counts(grid)
    # FlexAttention assumes one width for both lists. It is at least 2, because torch compiles anew for lists of one.
    width = min(max(2, int(counts.amax())), grid.shape[-1])
    lists = counts.new_zeros(*counts.shape, width)
    for rows in torch.arange(grid.shape[-2], device=grid.device).split(_at_once(grid[..., 0, :].numel())):
        lists[..., rows, :] = _places(grid[..., rows, :], width)
    partial, full = lists
    for table in (partial, full):  # the width depends on a batch's documents, and must not make torch compile anew
        torch._dynamo.maybe_mark_dynamic(table, 3)
    return counts[0], partial, counts[1], full


def _places(kind: Tensor, width: int) -> Tensor:
    """Return the indices at which each row is True, in order, [..., W]; the rest is 0."""
    slots = torch.where(kind, kind.cumsum(-1) - 1, width)
    places = torch.arange(kind.shape[-1], dtype=torch.int32, device=kind.device).expand(kind.shape)
    table = places.new_zeros(*kind.shape[:-1], width + 1)
    return table.scatter_(-1, slots, places)[..., :width]
