"""Timing of attention kernels: forward and backward of every static pattern, by the pairs of tokens that it needs."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from lctrain.attention.base import Layout, MaskedAttention
from lctrain.attention.full import FullAttention
from lctrain.attention.shifted_sparse import ShiftedSparseAttention
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.attention.streaming import StreamingAttention
from lctrain.benchmark.points import DOES_NOT_FIT, Points
from lctrain.errors import InputError
from lctrain.kernels.base import Demand, Kernel
from lctrain.kernels.block_mask import BLOCK, block_mask
from lctrain.kernels.choose import choose
from lctrain.kernels.mask import Mask
from lctrain.tables import show

log = logging.getLogger(__name__)

GOAL = 0.85  # share of the rate of causal attention over a whole row of the same length
IN_A_ROW_SECONDS, MEASURED_SECONDS = 0.05, 2.0
DOCUMENTS = (0.4, 0.3, 0.2, 0.1)  # shares of a packed row; lengths are made odd, so that no block divides them
PATTERNS: dict[str, MaskedAttention] = {
    "full": FullAttention(),
    "sliding_window": SlidingWindowAttention(sliding_window=4096),
    "streaming": StreamingAttention(num_sink_tokens=64, recent_size=4096),
    "shifted_sparse": ShiftedSparseAttention(group_size_ratio=0.25),
}


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The shape of a layer's attention."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """The times of one pattern at one length: medians in seconds, rates by the pairs that the pattern needs."""

    kernel: str
    pattern: str
    packed: bool
    length: int
    pairs_per_head: float
    mask_seconds: float
    mask_bytes: int
    forward_seconds: float
    seconds: float  # forward and backward
    tflops_per_second: float
    of_full: float | None = None  # the rate divided by that of "full", not packed, with this kernel and length


FIELDS = [field.name for field in fields(Result)]


def kernels(cfg: DictConfig) -> list[Result]:
    """Time every pattern, alone and packed, at every length on every backend; report a case that fails and go on.

    Write each result into run_dir/kernels.jsonl as soon as it is measured. Raise InputError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise InputError("benchmark kernels needs a CUDA device")
    heads = Heads(**{name: cfg.kernels[name] for name in Heads.__dataclass_fields__})
    demand = Demand(device_type="cuda", dtype=torch.bfloat16, head_dim=heads.head_dim, softcap=None)
    chosen = dict(choose(name, demand) for name in cfg.kernels.backends or [cfg.kernel])
    points = Points(Path(cfg.run_dir) / "kernels.jsonl", cfg.minutes)
    cases = product(cfg.kernels.lengths, (False, True), cfg.kernels.patterns, chosen.items())
    for length, packed, pattern, (name, kernel) in cases:
        point = asdict(heads) | {"kernel": name, "pattern": pattern, "packed": packed, "length": length}
        points.measure(point, partial(_tried, name, kernel, pattern, packed, length, heads, cfg.num_repeats))
    measured = [row for row in points.rows if "error" not in row]
    results = _against_full([Result(**{field: row[field] for field in FIELDS}) for row in measured])
    _print(results, points.told())
    return results


def _tried(name: str, kernel: Kernel, pattern: str, *case: Any) -> dict[str, Any]:
    try:
        return asdict(_case(name, kernel, pattern, *case))
    except torch.OutOfMemoryError:
        return {"error": DOES_NOT_FIT}
    except Exception as error:  # other cases may still run
        log.exception("%s on kernel=%s failed", pattern, name)
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        torch.cuda.empty_cache()


def row_mask(method: MaskedAttention, length: int, heads: Heads, documents: list[int], device: str) -> Mask:
    """Return the mask of one row with documents of these lengths, as a model with `method` would build it."""
    layout = Layout(
        length=length,
        num_attention_heads=heads.num_attention_heads,
        num_key_value_heads=heads.num_key_value_heads,
        layer_idx=0,
        device=torch.device(device),
    )
    sizes = torch.tensor(documents, device=device)
    numbers = torch.arange(len(documents), device=device).repeat_interleave(sizes)
    positions = (torch.arange(length, device=device) - (sizes.cumsum(0) - sizes)[numbers])[None].int()
    packed = len(documents) > 1
    num_heads = len(method.head_groups(layout, heads.num_attention_heads))
    return Mask(
        q_length=length,
        kv_length=length,
        num_heads=num_heads,
        num_key_value_groups=heads.num_attention_heads // heads.num_key_value_heads,
        head_dim=heads.head_dim,
        device=torch.device(device),
        dtype=torch.bfloat16,
        allowed=causal_mask_function,
        visible=method.visible(layout),
        positions=(positions, positions) if packed else None,
        documents=(numbers[None].int(), numbers[None].int()) if packed else None,
        local=method.local_heads(layout, range(num_heads)),
    )


def count_pairs(mask: Mask) -> float:
    """Return the number of attending pairs of tokens per row and query head, on average.

    Full blocks count with all their pairs; the pairs of partial blocks are counted one by one.
    """
    blocks = block_mask(mask)
    size, mask_mod = blocks.BLOCK_SIZE[0], mask.mask_mod()
    assert blocks.full_kv_num_blocks is not None
    total = int(blocks.full_kv_num_blocks.sum()) * size * BLOCK
    used = torch.arange(blocks.kv_indices.shape[-1], device=mask.device) < blocks.kv_num_blocks[..., None]
    b, h, q, slot = used.nonzero().unbind(1)
    kv = blocks.kv_indices[b, h, q, slot]
    for part in torch.arange(len(b), device=mask.device).split(2**28 // (size * BLOCK)):
        q_idx = q[part, None, None] * size + torch.arange(size, device=mask.device)[:, None]
        kv_idx = kv[part, None, None] * BLOCK + torch.arange(BLOCK, device=mask.device)
        inside = (q_idx < mask.q_length) & (kv_idx < mask.kv_length)
        q_idx, kv_idx = q_idx.clamp(max=mask.q_length - 1), kv_idx.clamp(max=mask.kv_length - 1)
        total += int((mask_mod(b[part, None, None], h[part, None, None], q_idx, kv_idx) & inside).sum())
    return total / (mask.batch * mask.num_heads)


def packed_documents(length: int) -> list[int]:
    """Return the lengths of the documents of a packed row."""
    sizes = [int(share * length) // 2 * 2 - 1 for share in DOCUMENTS[:-1]]
    return [*sizes, length - sum(sizes)]


def _case(name: str, kernel: Kernel, pattern: str, packed: bool, length: int, heads: Heads, num_repeats: int) -> Result:
    documents = packed_documents(length) if packed else [length]
    mask = row_mask(PATTERNS[pattern], length, heads, documents, "cuda")
    pairs = count_pairs(mask)
    torch.cuda.empty_cache()
    kernel.prepare(mask)  # the first call loads kernels
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    prepared = kernel.prepare(mask)
    torch.cuda.synchronize()
    mask_seconds = time.perf_counter() - start
    mask_bytes = torch.cuda.max_memory_allocated() - before

    generator = torch.Generator("cuda").manual_seed(0)
    counts = (heads.num_attention_heads, heads.num_key_value_heads, heads.num_key_value_heads)
    q, k, v = (_random(length, count, heads.head_dim, generator).requires_grad_() for count in counts)
    upstream = _random(length, heads.num_attention_heads, heads.head_dim, generator)

    def forward() -> Tensor:
        return kernel.attend(q, k, v, prepared, scaling=heads.head_dim**-0.5, softcap=None)

    def forward_and_backward() -> None:
        q.grad = k.grad = v.grad = None
        forward().backward(upstream)

    seconds = _median_seconds(forward_and_backward, num_repeats)
    with torch.no_grad():
        forward_seconds = _median_seconds(forward, num_repeats)
    # The forward takes two products of 2·D operations a pair, the backward five: 4·D·pairs·H, and 2.5 times that.
    flops = 3.5 * 4 * heads.head_dim * pairs * heads.num_attention_heads
    result = Result(
        kernel=name,
        pattern=pattern,
        packed=packed,
        length=length,
        pairs_per_head=pairs,
        mask_seconds=mask_seconds,
        mask_bytes=mask_bytes,
        forward_seconds=forward_seconds,
        seconds=seconds,
        tflops_per_second=flops / seconds / 1e12,
    )
    log.info("%s", result)
    return result


def _random(length: int, num_heads: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """Return random [1, H, L, D] in the memory layout of a model's projections."""
    shape = (1, length, num_heads, head_dim)
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator).transpose(1, 2)


def _median_seconds(run: Callable[[], Any], num_repeats: int) -> float:
    """Return the median of `num_repeats` measurements, or fewer if a run takes long, after a run that compiles.

    Several short runs are measured together: in a training step, too, the card does not wait for the host's launches.
    """
    run()
    in_a_row = max(1, int(IN_A_ROW_SECONDS / _seconds(run, 1)))
    times: list[float] = []
    while len(times) < num_repeats and sum(times) < MEASURED_SECONDS:
        times.append(_seconds(run, in_a_row))
    return median(times)


def _seconds(run: Callable[[], Any], count: int) -> float:
    """Return the seconds of one run, averaged over `count` consecutive runs."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1000 / count


def _against_full(rows: list[Result]) -> list[Result]:
    full = {(r.kernel, r.length): r.tflops_per_second for r in rows if r.pattern == "full" and not r.packed}
    rates = [full.get((row.kernel, row.length)) for row in rows]
    return [replace(r, of_full=rate and r.tflops_per_second / rate) for r, rate in zip(rows, rates, strict=True)]


def _print(results: list[Result], told: str) -> None:
    table = Table(
        "tokens", "pattern", "kernel", "forward ms", "with backward ms", "TF/s", "of full", "mask ms", "mask MiB"
    )
    for row in results:
        table.add_row(
            f"{row.length:,}",
            row.pattern + (", packed" if row.packed else ""),
            row.kernel,
            f"{1000 * row.forward_seconds:,.2f}",
            f"{1000 * row.seconds:,.2f}",
            f"{row.tflops_per_second:,.0f}",
            "" if row.of_full is None else f"{row.of_full:.0%}",
            f"{1000 * row.mask_seconds:,.1f}",
            f"{row.mask_bytes / 2**20:,.1f}",
        )
    show(table)
    below = sum(row.of_full is not None and row.of_full < GOAL for row in results)
    print(f"{len(results) - below} of {len(results)} at or above {GOAL:.0%} of full; {told}")
