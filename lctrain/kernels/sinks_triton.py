"""Triton kernels for `sinks`: a program reads a document's sinks once, and loops over a chunk of the queries.

Shape legend: as in sinks; G query heads of a key-value head.
"""

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lctrain.kernels.sinks import Sinks, padded

MERGE = {"BLOCK": 64, "num_warps": 4, "num_stages": 2}
GRADIENTS = {"BLOCK": 32, "num_warps": 4, "num_stages": 1}
MANY = {"BLOCK": 32, "num_warps": 8, "num_stages": 3}  # for gradients that would fill the registers of four warps
WIDE = {"BLOCK": 64, "num_stages": 1}  # for head dimensions above 128
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit  # type: ignore[untyped-decorator]
def _read(  # type: ignore[no-untyped-def]
    start, stride, NUM: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Return the sinks' keys or values of one head, [SINKS, WIDTH]."""
    n, d = tl.arange(0, SINKS), tl.arange(0, WIDTH)
    return tl.load(start + n[:, None] * stride + d[None], mask=(n[:, None] < NUM) & (d[None] < D), other=0.0)


@triton.jit(do_not_specialize=["window", "lse_row", "lse_head"])  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, chunks, window, scaling_log2, lse_row, lse_head,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, out_row, out_token, out_head,
    NUM: tl.constexpr, SINKS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the output and log-sum-exp of a chunk's window and sinks over those of its window."""
    chunk, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start, begin, end = tl.load(chunks + 4 * chunk), tl.load(chunks + 4 * chunk + 1), tl.load(chunks + 4 * chunk + 2)
    m, n, d = tl.arange(0, BLOCK), tl.arange(0, SINKS), tl.arange(0, WIDTH)
    first = start.to(tl.int64)
    keys = _read(k + row * k_row + first * k_token + head // G * k_head, k_token, NUM, SINKS, D, WIDTH)
    values = _read(v + row * v_row + first * v_token + head // G * v_head, v_token, NUM, SINKS, D, WIDTH)
    for step in tl.range(begin, end, BLOCK):
        index = step + m
        token = index[:, None].to(tl.int64)
        valid = (index[:, None] < end) & (d[None] < D)
        queries = tl.load(q + row * q_row + token * q_token + head * q_head + d[None], mask=valid, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scaling_log2
        seen = (index[:, None] - start - n[None] >= window) & (n[None] < NUM)
        scores = tl.where(seen, scores, -float("inf"))
        place = lse + row * lse_row + head * lse_head + index
        before = tl.load(place, mask=index < end, other=0.0) / LN_2
        most = tl.maximum(before, tl.max(scores, 1))
        faded, weights = tl.exp2(before - most), tl.exp2(scores - most[:, None])
        sums = faded + tl.sum(weights, 1)
        spot = out + row * out_row + token * out_token + head * out_head + d[None]
        tile = tl.load(spot, mask=valid, other=0.0)
        added = tl.dot((weights / sums[:, None]).to(values.dtype), values, input_precision="ieee")
        tl.store(spot, (tile * (faded / sums)[:, None] + added).to(tile.dtype), mask=valid)
        tl.store(place, (most + tl.log2(sums)) * LN_2, mask=index < end)


@triton.jit(do_not_specialize=["window", "num_documents", "lse_row", "lse_head"])  # type: ignore[untyped-decorator]
def _gradients(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, d_out, d_q, d_k, d_v, chunks, window, num_documents, scaling, scaling_log2, lse_row, lse_head,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, out_row, out_token, out_head,
    d_out_row, d_out_token, d_out_head, d_q_row, d_q_token, d_q_head,
    NUM: tl.constexpr, SINKS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to a chunk's dq and to its document's dk and dv [B, P, S, K, D], for all query heads of a key-value head."""
    chunk, kv_head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start, begin, end = tl.load(chunks + 4 * chunk), tl.load(chunks + 4 * chunk + 1), tl.load(chunks + 4 * chunk + 2)
    m, n, d = tl.arange(0, BLOCK), tl.arange(0, SINKS), tl.arange(0, WIDTH)
    first = start.to(tl.int64)
    keys = _read(k + row * k_row + first * k_token + kv_head * k_head, k_token, NUM, SINKS, D, WIDTH)
    values = _read(v + row * v_row + first * v_token + kv_head * v_head, v_token, NUM, SINKS, D, WIDTH)
    sum_k = tl.zeros([SINKS, WIDTH], tl.float32)
    sum_v = tl.zeros([SINKS, WIDTH], tl.float32)
    per_head = tl.cdiv(end - begin, BLOCK)
    for step in tl.range(0, G * per_head):
        head = kv_head * G + step // per_head
        index = begin + step % per_head * BLOCK + m
        token = index[:, None].to(tl.int64)
        valid = (index[:, None] < end) & (d[None] < D)
        queries = tl.load(q + row * q_row + token * q_token + head * q_head + d[None], mask=valid, other=0.0)
        place = d_out + row * d_out_row + token * d_out_token + head * d_out_head + d[None]
        upstream = tl.load(place, mask=valid, other=0.0)
        tile = tl.load(out + row * out_row + token * out_token + head * out_head + d[None], mask=valid, other=0.0)
        delta = tl.sum(tile.to(tl.float32) * upstream.to(tl.float32), 1)
        whole = tl.load(lse + row * lse_row + head * lse_head + index, mask=index < end, other=0.0) / LN_2
        # Scores are sinks by queries, so that the sums below multiply the weights without a transpose.
        scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scaling_log2
        seen = (index[None] - start - n[:, None] >= window) & (n[:, None] < NUM)
        weights = tl.where(seen, tl.exp2(scores - whole[None]), 0.0)
        d_weights = tl.dot(values, tl.trans(upstream), input_precision="ieee")
        d_scores = (weights * (d_weights - delta[None]) * scaling).to(queries.dtype)
        sum_v += tl.dot(weights.to(upstream.dtype), upstream, input_precision="ieee")
        sum_k += tl.dot(d_scores, queries, input_precision="ieee")
        spot = d_q + row * d_q_row + token * d_q_token + head * d_q_head + d[None]
        added = tl.dot(tl.trans(d_scores), keys, input_precision="ieee")
        tl.store(spot, (tl.load(spot, mask=valid, other=0.0) + added).to(queries.dtype), mask=valid)
    document = row * num_documents + tl.load(chunks + 4 * chunk + 3)
    place = ((document * NUM + n[:, None]) * tl.num_programs(1) + kv_head) * D + d[None]
    held = (n[:, None] < NUM) & (d[None] < D)
    tl.atomic_add(d_k + place, sum_k, mask=held, sem="relaxed")
    tl.atomic_add(d_v + place, sum_v, mask=held, sem="relaxed")


def merge(
    sinks: Sinks, q_BLHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, out_BLHD: Tensor, lse_BHL: Tensor, scaling: float
) -> None:
    """Write output and log-sum-exp of window and sinks over those of the window. `lse_BHL` has stride 1 over tokens."""
    assert lse_BHL.stride(2) == 1
    num_rows, num_heads, _ = lse_BHL.shape
    _merge[(len(sinks.chunks), num_heads, num_rows)](
        q_BLHD, k_BLKD, v_BLKD, out_BLHD, lse_BHL, sinks.chunks, sinks.window, scaling / LN_2.value,
        *lse_BHL.stride()[:2], *_strides(q_BLHD, k_BLKD, v_BLKD, out_BLHD), **_shape(sinks, q_BLHD, k_BLKD, MERGE),
    )  # fmt: skip


def add_gradients(
    sinks: Sinks,
    q_BLHD: Tensor,
    k_BLKD: Tensor,
    v_BLKD: Tensor,
    out_BLHD: Tensor,
    lse_BHL: Tensor,
    d_out_BLHD: Tensor,
    d_q_BLHD: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Add the sinks' share to dq, and return the sinks' dk and dv in fp32, [B, P, S, K, D]."""
    num_rows, (num_documents, num) = lse_BHL.shape[0], sinks.tokens.shape
    d_k, d_v = torch.zeros(2, num_rows, num_documents, num, *k_BLKD.shape[2:], device=q_BLHD.device)
    many = prod(padded(num, k_BLKD.shape[3])) > 2**13
    _gradients[(len(sinks.chunks), k_BLKD.shape[2], num_rows)](
        q_BLHD, k_BLKD, v_BLKD, out_BLHD, lse_BHL, d_out_BLHD, d_q_BLHD, d_k, d_v, sinks.chunks, sinks.window,
        num_documents, scaling, scaling / LN_2.value, *lse_BHL.stride()[:2],
        *_strides(q_BLHD, k_BLKD, v_BLKD, out_BLHD, d_out_BLHD, d_q_BLHD),
        **_shape(sinks, q_BLHD, k_BLKD, MANY if many else GRADIENTS),
    )  # fmt: skip
    return d_k, d_v


def _strides(*tensors: Tensor) -> list[int]:
    assert all(x.stride(3) == 1 for x in tensors)
    return [step for x in tensors for step in x.stride()[:3]]


def _shape(sinks: Sinks, q_BLHD: Tensor, k_BLKD: Tensor, config: dict[str, int]) -> dict[str, Any]:
    num, head_dim = sinks.tokens.shape[1], q_BLHD.shape[3]
    held, width = padded(num, head_dim)
    shape = {"NUM": num, "SINKS": held, "G": q_BLHD.shape[2] // k_BLKD.shape[2], "D": head_dim, "WIDTH": width}
    return shape | config | (WIDE if head_dim > 128 else {})
