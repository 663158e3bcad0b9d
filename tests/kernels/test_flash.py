"""What flash-attn-4 computes by itself, with its functions written out here: the result is that of the mask."""

import gc
import sys
import weakref
from itertools import product
from types import ModuleType

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lctrain.kernels import flash
from lctrain.kernels.flash import FlashKernel
from lctrain.kernels.mask import Local, Mask
from lctrain.kernels.reference import ReferenceKernel
from lctrain.memory.recall import attend_once, recording, replaying


def mask_of(visible, length, *, queries=None, **options):
    """Of 4 heads, 2 of which share a key-value head."""
    queries = queries or length
    return Mask(
        q_length=queries, kv_length=length, num_heads=4, num_key_value_groups=2, head_dim=16,
        device=torch.device("cpu"), dtype=torch.float64, q_offset=length - queries,
        allowed=lambda b, h, q, k: k <= q, visible=visible, **options,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    for module in (ModuleType("flash_attn"), flash_attn_4(), sinks_triton()):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("lctrain.kernels.sinks.MIN_CHUNK", 4)  # several chunks of 20 tokens


def random_inputs(num_rows=1, length=20):
    """q, k and v [B, heads, L, D], laid out by head."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(num_rows, n, length, 16) for n in (4, 2, 2)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


LOCAL = {
    "causal": (Local(),),
    "window": (Local(window=5),),
    "groups": (Local(group=6),) * 2 + (Local(group=6, shift=3),) * 2,
    "two windows": (Local(window=5),) * 2 + (Local(),) * 2,
    "wide window": (Local(window=99),),
    "sinks": (Local(window=5, num_sinks=3),),
    "sinks of some heads": (Local(window=4, num_sinks=1),) * 2 + (Local(),) * 2,
}


@pytest.mark.parametrize(
    ("num_rows", "starts"),
    [
        (1, None),
        (2, None),
        (1, [[0] * 8 + [8] * 5 + [13] * 7]),
        (2, [[0] * 8 + [8] * 5 + [13] * 7]),
        (2, [[0] * 20, [0] + [1] * 19]),
    ],
)
@pytest.mark.parametrize("name", LOCAL)
def test_takes_local_heads_by_themselves(name, num_rows, starts):
    tables = None if starts is None else (torch.tensor(starts, dtype=torch.int32),) * 2
    positions = None if tables is None else (torch.arange(20, dtype=torch.int32) - tables[0],) * 2
    local = LOCAL[name]

    def visible(b, h, q, k):
        own = [local[0 if len(local) == 1 else head] for head in range(4)]
        window, num_sinks, group, shift = (
            torch.tensor([getattr(each, field) or default for each in own])[h]
            for field, default in (("window", 99), ("num_sinks", 0), ("group", 99), ("shift", 0))
        )
        return ((q - k < window) | (k < num_sinks)) & ((q + shift) // group == (k + shift) // group)

    mask = mask_of(visible, 20, local=local, positions=positions, documents=tables, num_rows=num_rows)
    q, k, v = random_inputs(num_rows)
    results = []
    for kernel in (FlashKernel(), ReferenceKernel()):
        out = kernel.attend(q, k, v, kernel.prepare(mask), scaling=0.3, softcap=None)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    torch.testing.assert_close(*results)


class Fused(torch.autograd.Function):
    """Documents in a window. Its backward takes output and log-sum-exp as they are kept, as kernels do."""

    @staticmethod
    def forward(ctx, q_BLHD, k_BLKD, v_BLKD, number, scaling, window):
        ctx.number, ctx.scaling, ctx.window = number, scaling, window
        q, k, v = (x.flatten(0, 1) for x in (q_BLHD, k_BLKD, v_BLKD))
        scores, rows = Fused.scores(ctx, q, k), q_BLHD.shape[:2]
        lse = scores.logsumexp(-1)
        out = torch.einsum("hts,shd->thd", (scores - lse[..., None]).exp(), Fused.shared(v, q))
        out_BLHD = out.unflatten(0, rows).contiguous()
        lse_BHL = lse.unflatten(1, rows).transpose(0, 1).contiguous()
        ctx.save_for_backward(q_BLHD, k_BLKD, v_BLKD, out_BLHD, lse_BHL)
        return out_BLHD, lse_BHL

    @staticmethod
    def backward(ctx, d_out_BLHD, _):
        *by_token, lse_BHL = ctx.saved_tensors
        q, k, v, out, d_out = (x.flatten(0, 1) for x in (*by_token, d_out_BLHD))
        lse = lse_BHL.transpose(0, 1).flatten(1)
        weights = (Fused.scores(ctx, q, k) - lse[..., None]).exp()
        d_weights = torch.einsum("thd,shd->hts", d_out, Fused.shared(v, q))
        d_scores = weights * (d_weights - (d_out * out).sum(-1).T[..., None]) * ctx.scaling
        d_q = torch.einsum("hts,shd->thd", d_scores, Fused.shared(k, q))
        d_k = torch.einsum("hts,thd->shd", d_scores, q).unflatten(1, (k.shape[1], -1)).sum(2)
        d_v = torch.einsum("hts,thd->shd", weights, d_out).unflatten(1, (k.shape[1], -1)).sum(2)
        return *(x.unflatten(0, d_out_BLHD.shape[:2]) for x in (d_q, d_k, d_v)), None, None, None

    @staticmethod
    def shared(x, q):
        return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)

    @staticmethod
    def scores(ctx, q, k):
        i = torch.arange(len(q))
        seen = (i <= i[:, None]) & (i[:, None] - i < ctx.window) & (ctx.number == ctx.number[:, None])
        return torch.einsum("thd,shd->hts", q, Fused.shared(k, q)).mul(ctx.scaling).masked_fill(~seen, -torch.inf)


def flash_attn_4():
    """What it documents, by torch's own operations."""

    def attend(q, k, v, sizes, *, softmax_scale, causal, window_size, return_lse):
        left, right = window_size
        assert causal
        assert return_lse
        assert right == 0
        number = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        return Fused.apply(q, k, v, number, softmax_scale, 99 if left is None else left + 1)

    def flash_attn_func(q, k, v, **options):
        return attend(q, k, v, [q.shape[1]] * q.shape[0], **options)

    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q[0] == 0
        assert cu_seqlens_q[-1] == len(q)
        sizes = cu_seqlens_q.diff().tolist()
        assert max(sizes) <= max_seqlen_q == max_seqlen_k
        return [x[0] for x in attend(*(x[None] for x in (q, k, v)), sizes, **options)]

    module = ModuleType("flash_attn.cute")
    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


def sinks_triton():
    """The kernels of sinks, by torch's own operations."""

    def parts(sinks, q, k, lse, scaling):
        """Of each chunk of each row: its document, queries, sinks, their sums, and the scores [H, queries, sinks]."""
        num = sinks.tokens.shape[1]
        for row, (start, begin, end, document) in product(range(len(lse)), sinks.chunks.tolist()):
            rows, keys = (row, slice(begin, end)), (row, slice(start, start + num))
            scores = torch.einsum("thd,shd->hts", q[rows], shared(k, keys, q)) * scaling
            i, j = torch.arange(begin, end)[:, None], torch.arange(start, start + num)
            scores = scores.masked_fill(i - j < sinks.window, -torch.inf)
            yield (row, document), rows, keys, lse[row, :, begin:end], scores

    def shared(x, keys, q):
        return x[keys].repeat_interleave(q.shape[2] // x.shape[2], dim=1)

    def merge(sinks, q, k, v, out, lse, scaling):
        for _, rows, keys, before, scores in parts(sinks, q, k, lse, scaling):
            merged = torch.logaddexp(before, scores.logsumexp(-1))
            added = torch.einsum("hts,shd->thd", (scores - merged[..., None]).exp(), shared(v, keys, q))
            out[rows] = out[rows] * (before - merged).exp().T[..., None] + added
            before.copy_(merged)

    def add_gradients(sinks, q, k, v, out, lse, d_out, d_q, scaling):
        d_k, d_v = q.new_zeros(2, len(lse), *sinks.tokens.shape, *k.shape[2:])
        for document, rows, keys, whole, scores in parts(sinks, q, k, lse, scaling):
            weights = (scores - whole[..., None]).exp()
            d_weights = torch.einsum("thd,shd->hts", d_out[rows], shared(v, keys, q))
            d_scores = weights * (d_weights - (d_out * out)[rows].sum(-1).T[..., None]) * scaling
            d_q[rows] += torch.einsum("hts,shd->thd", d_scores, shared(k, keys, q))
            d_k[document] += torch.einsum("hts,thd->shd", d_scores, q[rows]).unflatten(1, (k.shape[2], -1)).sum(2)
            d_v[document] += torch.einsum("hts,thd->shd", weights, d_out[rows]).unflatten(1, (k.shape[2], -1)).sum(2)
        return d_k, d_v

    module = ModuleType("lctrain.kernels.sinks_triton")
    module.merge, module.add_gradients = merge, add_gradients
    return module


@pytest.mark.parametrize("keep", [False, True])
def test_sinks_in_a_layer_that_is_recomputed(keep):
    """What is written over the window's output is what the backward finds, kept or computed again."""
    mask = mask_of(lambda b, h, q, k: (q - k < 5) | (k < 3), 20, local=(Local(window=5, num_sinks=3),))
    q, k, v = random_inputs()
    results = []
    for kernel in (FlashKernel(), ReferenceKernel()):
        prepared, calls = kernel.prepare(mask), []

        def attend(*qkv, kernel=kernel, prepared=prepared):
            return kernel.attend(*qkv, prepared, scaling=0.3, softcap=None)

        def layer(*qkv, attend=attend):
            return attend_once(attend, *(2 * x for x in qkv)).sin()

        def contexts(calls=calls):
            return recording(calls, keep=keep), replaying(calls)

        out = checkpoint(layer, q, k, v, use_reentrant=False, context_fn=contexts)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["sinks", "window"])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_keeps_inputs_one_output_and_a_number_for_each_query(name, num_rows):
    """Of whole rows, however they lie in memory."""
    (local,) = LOCAL[name]
    mask = mask_of(lambda b, h, q, k: (q - k < 5) | (k < local.num_sinks), 20, local=(local,), num_rows=num_rows)
    q, k, v = random_inputs(num_rows)
    kept, kernel = {}, FlashKernel()

    def pack(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = kernel.attend(q, k, v, kernel.prepare(mask), scaling=0.3, softcap=None)
    tensors = (q, k, v, out, torch.empty(num_rows, 4, 20, dtype=out.dtype))
    assert sum(kept.values()) == sum(8 * x.numel() for x in tensors)


def test_a_backward_that_fails_leaves_nothing(monkeypatch):
    """As out of memory: its tensors must not hang on each other."""

    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Fused, "backward", fail)
    mask, kernel = mask_of(lambda b, h, q, k: (q - k < 5) | (k < 3), 20, local=LOCAL["sinks"]), FlashKernel()
    q, k, v = random_inputs()
    out = kernel.attend(q, k, v, kernel.prepare(mask), scaling=0.3, softcap=None)
    left = weakref.ref(out.untyped_storage())
    with pytest.raises(torch.OutOfMemoryError):
        out.sum().backward()
    del out
    gc.collect()
    assert left() is None


def test_documents_that_begin_elsewhere_need_a_mask():
    positions = torch.arange(20)[None].int() + 1
    visible = lambda b, h, q, k: (q - k < 5) | (k < 3)  # noqa: E731
    for shift, by_itself in ((0, False), (1, True)):
        mask = mask_of(visible, 20, local=LOCAL["sinks"], positions=(positions - shift,) * 2)
        assert (flash._alike(mask, LOCAL["sinks"]) is not None) == by_itself


@pytest.mark.parametrize(
    ("length", "queries", "num_sinks", "window"),
    [(20, 20, 6, 5), (3000, 3000, 1200, 1500), (20, 7, 3, 5)],
    ids=["more than the window", "more than a program holds", "a chunk"],
)
def test_other_sinks_need_a_mask(length, queries, num_sinks, window):
    local = (Local(window=window, num_sinks=num_sinks),)
    mask = mask_of(lambda b, h, q, k: (q - k < window) | (k < num_sinks), length, queries=queries, local=local)
    assert flash._alike(mask, local) is None


def test_heads_that_share_keys_and_see_different_things_need_a_mask():
    mask = mask_of(lambda b, h, q, k: k <= q, 9, local=(Local(), Local(window=3)) * 2)
    assert not isinstance(FlashKernel().prepare(mask), list)
