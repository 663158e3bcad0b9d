"""Run Flash-Decoding (Dao et al., 2023) of one token for `one_query`: many programs share a head's keys.

Shape legend: as in one_query.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lctrain.decode.one_query import Buffer
from lctrain.kernels.sinks import shared_memory

BLOCK = 64  # keys that are loaded at once
PROGRAMS = 2  # on each processor of the card, so that their loads overlap
MIN_ROWS = 16  # queries: the least that tensor cores take
FEW = 8  # blocks of keys, or fewer, that one program reads alone
PARTS = 32  # splits that are merged at once
LOG2_E = 1.4426950408889634

# Arguments that differ between layers: not specialized, so that one compiled kernel runs for all.
LAYER = ["num_heads", "kept_a", "kept_b", "splits_a", "splits_b", "num_in_a", "max_splits"]


@triton.jit  # type: ignore[untyped-decorator]
def _read(  # type: ignore[no-untyped-def]
    queries, keys, values, base, first, last, scaling_log2,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the largest score, the sum of weights and the weighted sum of values of each query.

    All are over a head's slots from `first` to `last`, with weights 2^(score − largest score).
    """
    d, n = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    most = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(first, last, BLOCK):
        places = base + (start + n[:, None]) * D + d[None]
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
    return most, total, sums


@triton.jit(do_not_specialize=LAYER)  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, before, out, parts, lse, keys_a, keys_b, values_a, values_b, heads_a, heads_b,
    num_heads, kept_a, kept_b, splits_a, splits_b, num_in_a, max_splits, scaling_log2,
    sinks_a, sinks_b, turns_a, turns_b, stride_row_a, stride_row_b, stride_head_a, stride_head_b,
    stride_q, stride_k, stride_v, stride_out,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TWO: tl.constexpr, ALL_HEADS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend to one split of one head's keys, in buffer a or b; first store the new token if its slot is in the split.

    `q`, `k`, `v` and `out` are [B, heads, D].
    """
    program = tl.program_id(0)
    keys, values, heads, kept, splits = keys_a, values_a, heads_a, kept_a, splits_a
    num_sinks, num_turns, stride_row, stride_head = sinks_a, turns_a, stride_row_a, stride_head_a
    if TWO:
        in_a = program < num_in_a
        program = tl.where(in_a, program, program - num_in_a)
        keys, values = tl.where(in_a, keys_a, keys_b), tl.where(in_a, values_a, values_b)
        heads, kept = tl.where(in_a, heads_a, heads_b), tl.where(in_a, kept_a, kept_b)
        splits = tl.where(in_a, splits_a, splits_b)
        num_sinks, num_turns = tl.where(in_a, sinks_a, sinks_b), tl.where(in_a, turns_a, turns_b)
        stride_row = tl.where(in_a, stride_row_a, stride_row_b)
        stride_head = tl.where(in_a, stride_head_a, stride_head_b)
    row, split = program // splits, program % splits
    b, p = row // kept, row % kept
    head = p if ALL_HEADS else tl.load(heads + p).to(tl.int32)
    position = tl.load(before).to(tl.int32)
    # As one_query.slot_of does; that a remainder is truncated towards zero here does not change the minimum.
    slot = tl.minimum(position, num_sinks + (position - num_sinks) % num_turns)
    held = tl.minimum(position + 1, num_sinks + num_turns)
    share = tl.cdiv(tl.cdiv(held, BLOCK), splits) * BLOCK
    first, last = split * share, tl.minimum(split * share + share, held)

    d, g = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    base = b.to(tl.int64) * stride_row + p.to(tl.int64) * stride_head
    if (slot >= first) & (slot < last):
        place = base + slot * D + d
        tl.store(keys + place, tl.load(k + b * stride_k + head * D + d, mask=d < D), mask=d < D)
        tl.store(values + place, tl.load(v + b * stride_v + head * D + d, mask=d < D), mask=d < D)
    tl.debug_barrier()  # makes the stored token visible to all threads of this program, the only one that reads it

    valid_q = (g[:, None] < G) & (d[None] < D)
    queries = tl.load(q + b * stride_q + (head * G + g[:, None]) * D + d[None], mask=valid_q, other=0.0)
    most, total, sums = _read(queries, keys, values, base, first, last, scaling_log2, D, WIDTH, ROWS, BLOCK)
    empty = first >= last
    sums = sums / tl.where(empty, 1.0, total)[:, None]
    if splits == 1:
        place = out + b * stride_out + (head * G + g[:, None]) * D + d[None]
        tl.store(place, sums.to(out.dtype.element_ty), mask=valid_q)
    else:
        part = ((b * num_heads + head) * G + g) * max_splits + split
        tl.store(lse + part, tl.where(empty, -float("inf"), most + tl.log2(total)), mask=g < G)
        tl.store(parts + part[:, None] * WIDTH + d[None], sums, mask=(g[:, None] < G))


@triton.jit(do_not_specialize=["num_heads", "num_kept", "splits", "max_splits"])  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    heads, out, parts, lse, num_heads, num_kept, splits, max_splits, stride_out,
    G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ALL_HEADS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Merge the results of one query over all splits of a buffer."""
    row = tl.program_id(0)
    b, p, g = row // (num_kept * G), row // G % num_kept, row % G
    head = p if ALL_HEADS else tl.load(heads + p).to(tl.int32)
    first = ((b * num_heads + head) * G + g) * max_splits
    d, s = tl.arange(0, WIDTH), tl.arange(0, PARTS)
    most, total = tl.full([], -float("inf"), tl.float32), tl.zeros([], tl.float32)
    sums = tl.zeros([WIDTH], tl.float32)
    for start in tl.range(0, splits, PARTS):
        valid = start + s < splits
        here = tl.load(lse + first + start + s, mask=valid, other=-float("inf"))
        place = parts + (first + start + s[:, None]) * WIDTH + d[None]
        tile = tl.load(place, mask=valid[:, None], other=0.0)
        higher = tl.maximum(most, tl.max(here, 0))
        weights, faded = tl.exp2(here - higher), tl.exp2(most - higher)
        sums = sums * faded + tl.sum(weights[:, None] * tile, 0)
        total = total * faded + tl.sum(weights, 0)
        most = higher
    place = out + b * stride_out + (head * G + g) * D + d
    tl.store(place, (sums / total).to(out.dtype.element_ty), mask=d < D)


def launch(
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    v_BKLD: Tensor,
    buffers: Sequence[Buffer],
    before_1: Tensor,
    out_BHLD: Tensor,
    scaling: float,
) -> None:
    """Compute `one_query.attend_one` on a CUDA device. One launch reads two buffers at the same time."""
    q, k, v = (x.contiguous().flatten(1) for x in (q_BHLD, k_BKLD, v_BKLD))
    num_rows, num_heads, _, head_dim = k_BKLD.shape
    group, width = q_BHLD.shape[1] // num_heads, triton.next_power_of_2(head_dim)
    for first in range(0, len(buffers), 2):
        pair = buffers[first : first + 2]
        a, b = pair[0], pair[-1]
        splits = _splits([num_rows * x.keys.shape[1] for x in pair], [x.keys.shape[2] for x in pair], q.device)
        num_parts = num_rows * q_BHLD.shape[1] * max(splits)
        parts, lse = (q.new_empty(num_parts, n, dtype=torch.float32) for n in (width, 1))
        heads = [before_1 if x.heads is None else x.heads for x in (a, b)]
        programs = [num_rows * x.keys.shape[1] * n for x, n in zip(pair, splits, strict=True)]
        shape: dict[str, Any] = {"G": group, "D": head_dim, "WIDTH": width, "ALL_HEADS": a.heads is None}
        _attend[(sum(programs),)](
            q, k, v, before_1, out_BHLD, parts, lse, a.keys, b.keys, a.values, b.values, *heads,
            num_heads, a.keys.shape[1], b.keys.shape[1], splits[0], splits[-1], programs[0], max(splits),
            scaling * LOG2_E, a.num_sinks, b.num_sinks, a.num_turns, b.num_turns,
            a.keys.stride(0), b.keys.stride(0), a.keys.stride(1), b.keys.stride(1),
            q.stride(0), k.stride(0), v.stride(0), out_BHLD.stride(0),
            **shape, TWO=len(pair) == 2, ROWS=max(MIN_ROWS, triton.next_power_of_2(group)), BLOCK=BLOCK,
            num_warps=4, num_stages=max(1, min(3, shared_memory(q.device) // (2 * BLOCK * width * q.element_size()))),
        )  # fmt: skip
        for buffer, own, number in zip(pair, heads, splits, strict=False):
            if number > 1:
                num_kept = buffer.keys.shape[1]
                _merge[(num_rows * num_kept * group,)](
                    own, out_BHLD, parts, lse, num_heads, num_kept, number, max(splits), out_BHLD.stride(0),
                    **shape, PARTS=PARTS, num_warps=4,
                )  # fmt: skip


def _splits(num_rows: list[int], num_slots: list[int], device: torch.device) -> list[int]:
    """Return each buffer's number of splits: 1 where keys are few, else as many as fill the rest of the card."""
    large = [n > FEW * BLOCK for n in num_slots]
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    left = PROGRAMS * num_processors - sum(n for n, is_large in zip(num_rows, large, strict=True) if not is_large)
    share = left // max(1, sum(n for n, is_large in zip(num_rows, large, strict=True) if is_large))
    return [max(1, min(share, -(-n // BLOCK))) if is_large else 1 for n, is_large in zip(num_slots, large, strict=True)]
