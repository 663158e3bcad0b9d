"""Flash-Decoding (Dao et al., 2023) of one token for `one_query`: many programs share a head's keys.

Shape legend: as in one_query; G query heads of a key-value head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lctrain.kernels.one_query import Buffer

BLOCK = 64  # keys that are loaded at once
PROGRAMS = 2  # on each processor of the card: their loads overlap
SHARED_MEMORY = 200 * 2**10  # bytes of a processor, for the blocks under way
MIN_ROWS = 16  # what tensor cores take of queries
FEW = 8  # blocks of keys that one program reads alone
PARTS = 16  # splits that are merged at once
LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["num_heads", "num_kept", "splits"])  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, keys, values, heads, before, out, parts, lse,
    num_heads, num_kept, splits, scaling_log2, num_sinks, num_turns,
    stride_q, stride_k, stride_v, stride_row, stride_head, stride_slot, stride_out,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ALL_HEADS: tl.constexpr,
    ALONE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of one head's keys; its owner stores the new token. `q`, `k`, `v` and `out` are [B, heads, D]."""
    split, row = tl.program_id(0), tl.program_id(1)
    b, p = row // num_kept, row % num_kept
    head = p if ALL_HEADS else tl.load(heads + p).to(tl.int32)
    position = tl.load(before).to(tl.int32)
    # As one_query.slot_of; a remainder truncated towards zero gives the same.
    slot = tl.minimum(position, num_sinks + (position - num_sinks) % num_turns)
    held = tl.minimum(position + 1, num_sinks + num_turns)
    share = tl.cdiv(tl.cdiv(held, BLOCK), splits) * BLOCK
    first, last = split * share, tl.minimum(split * share + share, held)

    d, g, n = tl.arange(0, WIDTH), tl.arange(0, ROWS), tl.arange(0, BLOCK)
    base = b.to(tl.int64) * stride_row + p.to(tl.int64) * stride_head
    if (slot >= first) & (slot < last):
        place = base + slot * stride_slot + d
        tl.store(keys + place, tl.load(k + b * stride_k + head * D + d, mask=d < D), mask=d < D)
        tl.store(values + place, tl.load(v + b * stride_v + head * D + d, mask=d < D), mask=d < D)
    tl.debug_barrier()  # what was stored is seen by all threads of this program, which alone reads it

    valid_q = (g[:, None] < G) & (d[None] < D)
    queries = tl.load(q + b * stride_q + (head * G + g[:, None]) * D + d[None], mask=valid_q, other=0.0)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(first, last, BLOCK):
        places = base + (start + n[:, None]) * stride_slot + d[None]
        valid = (start + n[:, None] < last) & (d[None] < D)
        tile = tl.load(keys + places, mask=valid, other=0.0)
        scores = tl.dot(queries, tl.trans(tile), input_precision="ieee") * scaling_log2
        scores = tl.where(start + n[None] < last, scores, -float("inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights, faded = tl.exp2(scores - higher[:, None]), tl.exp2(most - higher)
        tile = tl.load(values + places, mask=valid, other=0.0)
        sums = sums * faded[:, None] + tl.dot(weights.to(tile.dtype), tile, input_precision="ieee")
        total = total * faded + tl.sum(weights, 1)
        most = higher
    empty = first >= last
    sums = sums / tl.where(empty, 1.0, total)[:, None]
    if ALONE:
        place = out + b * stride_out + (head * G + g[:, None]) * D + d[None]
        tl.store(place, sums.to(out.dtype.element_ty), mask=valid_q)
    else:
        query = (b * num_heads + head) * G + g
        tl.store(lse + query * splits + split, tl.where(empty, -float("inf"), most + tl.log2(total)), mask=g < G)
        tl.store(parts + (query[:, None] * splits + split) * WIDTH + d[None], sums, mask=(g[:, None] < G))


@triton.jit(do_not_specialize=["num_heads", "num_kept", "splits"])  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    heads, out, parts, lse, num_heads, num_kept, splits, stride_out,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ALL_HEADS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What one query saw in all splits."""
    row = tl.program_id(0)
    b, p, g = row // (num_kept * G), row // G % num_kept, row % G
    head = p if ALL_HEADS else tl.load(heads + p).to(tl.int32)
    query = (b * num_heads + head) * G + g
    d, s = tl.arange(0, WIDTH), tl.arange(0, PARTS)
    most = tl.full([], -float("inf"), tl.float32)
    for start in tl.range(0, splits, PARTS):
        here = tl.load(lse + query * splits + start + s, mask=start + s < splits, other=-float("inf"))
        most = tl.maximum(most, tl.max(here, 0))
    total, sums = tl.zeros([], tl.float32), tl.zeros([WIDTH], tl.float32)
    for start in tl.range(0, splits, PARTS):
        valid = start + s < splits
        weights = tl.exp2(tl.load(lse + query * splits + start + s, mask=valid, other=-float("inf")) - most)
        place = parts + (query * splits + start + s[:, None]) * WIDTH + d[None]
        sums += tl.sum(weights[:, None] * tl.load(place, mask=valid[:, None], other=0.0), 0)
        total += tl.sum(weights, 0)
    place = out + b * stride_out + (head * G + g) * D + d
    tl.store(place, (sums / total).to(out.dtype.element_ty), mask=d < D)


def launch(
    q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, buffer: Buffer, before_1: Tensor, out_BHLD: Tensor, scaling: float
) -> None:
    """As `one_query.attend_one`, on a CUDA device."""
    q, k, v = (x.contiguous().flatten(1) for x in (q_BHLD, k_BKLD, v_BKLD))
    (num_rows, num_kept, num_slots, head_dim), num_heads = buffer.keys.shape, k_BKLD.shape[1]
    group, width = q_BHLD.shape[1] // num_heads, triton.next_power_of_2(head_dim)
    splits = _splits(num_rows * num_kept, num_slots, q.device)
    num_parts = num_rows * q_BHLD.shape[1] * splits
    parts, lse = (q.new_empty(num_parts, n, dtype=torch.float32) for n in (width, 1))
    heads = before_1 if buffer.heads is None else buffer.heads  # any tensor: ALL_HEADS reads none
    sizes = num_heads, num_kept, splits
    shape: dict[str, Any] = {"G": group, "D": head_dim, "WIDTH": width, "ALL_HEADS": buffer.heads is None}
    _attend[splits, num_rows * num_kept](
        q, k, v, buffer.keys, buffer.values, heads, before_1, out_BHLD, parts, lse,
        *sizes, scaling * LOG2_E, buffer.num_sinks, buffer.num_turns,
        q.stride(0), k.stride(0), v.stride(0), *buffer.keys.stride()[:3], out_BHLD.stride(0),
        **shape, ALONE=splits == 1, ROWS=max(MIN_ROWS, triton.next_power_of_2(group)), BLOCK=BLOCK,
        num_warps=4, num_stages=max(1, min(3, SHARED_MEMORY // (2 * BLOCK * width * q.element_size()))),
    )  # fmt: skip
    if splits > 1:
        grid = (num_rows * num_kept * group,)
        _merge[grid](heads, out_BHLD, parts, lse, *sizes, out_BHLD.stride(0), **shape, PARTS=PARTS, num_warps=4)


def _splits(num_rows: int, num_slots: int, device: torch.device) -> int:
    """As many as fill the card; one where so few keys are soon read."""
    if num_slots <= FEW * BLOCK:
        return 1
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(PROGRAMS * num_processors // num_rows, -(-num_slots // BLOCK)))
