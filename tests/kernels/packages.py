"""The functions of fused kernels, as documented, by torch's own operations, for machines without a card."""

from itertools import product
from types import ModuleType

import torch


class Fused(torch.autograd.Function):
    """Attention to what is `seen`. Its backward takes output and log-sum-exp as they are kept, as kernels do."""

    @staticmethod
    def forward(ctx, q_BLHD, k_BSKD, v_BSKD, seen, scaling):
        ctx.seen, ctx.scaling = seen, scaling
        q, k, v = (x.flatten(0, 1) for x in (q_BLHD, k_BSKD, v_BSKD))
        scores, rows = Fused.scores(ctx, q, k), q_BLHD.shape[:2]
        lse = scores.logsumexp(-1)
        out = torch.einsum("hts,shd->thd", (scores - lse[..., None]).exp(), shared(v, q))
        out_BLHD = out.unflatten(0, rows).contiguous()
        lse_BHL = lse.unflatten(1, rows).transpose(0, 1).contiguous()
        ctx.save_for_backward(q_BLHD, k_BSKD, v_BSKD, out_BLHD, lse_BHL)
        return out_BLHD, lse_BHL

    @staticmethod
    def backward(ctx, d_out_BLHD, _):
        *by_token, lse_BHL = ctx.saved_tensors
        q, k, v, out, d_out = (x.flatten(0, 1) for x in (*by_token, d_out_BLHD))
        lse = lse_BHL.transpose(0, 1).flatten(1)
        weights = (Fused.scores(ctx, q, k) - lse[..., None]).exp()
        d_weights = torch.einsum("thd,shd->hts", d_out, shared(v, q))
        d_scores = weights * (d_weights - (d_out * out).sum(-1).T[..., None]) * ctx.scaling
        d_q = torch.einsum("hts,shd->thd", d_scores, shared(k, q))
        d_k = torch.einsum("hts,thd->shd", d_scores, q).unflatten(1, (k.shape[1], -1)).sum(2)
        d_v = torch.einsum("hts,thd->shd", weights, d_out).unflatten(1, (k.shape[1], -1)).sum(2)
        shapes = (x.shape[:2] for x in by_token[:3])
        return *(x.unflatten(0, shape) for x, shape in zip((d_q, d_k, d_v), shapes, strict=True)), None, None

    @staticmethod
    def scores(ctx, q, k):
        return torch.einsum("thd,shd->hts", q, shared(k, q)).mul(ctx.scaling).masked_fill(~ctx.seen, -torch.inf)


def shared(x, q):
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def attend(q, k, v, sizes_q, sizes_k, scaling, left):
    """Causal attention in a window that reaches `left` keys back, of rows whose last query meets their last key."""

    def places(sizes):
        numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        return numbers, torch.cat([torch.arange(-size, 0) for size in sizes])

    (number_q, place_q), (number_k, place_k) = places(sizes_q), places(sizes_k)
    distance = place_q[:, None] - place_k
    seen = (number_q[:, None] == number_k) & (distance >= 0) & (distance <= (left if left >= 0 else 999))
    return Fused.apply(q, k, v, seen, scaling)


def attend_whole(q, k, v, scaling, left):
    return attend(q, k, v, *([x.shape[1]] * x.shape[0] for x in (q, k)), scaling, left)


def attend_packed(q, k, v, starts_q, starts_k, longest_q, longest_k, scaling, left):
    sizes = []
    for x, starts, longest in ((q, starts_q, longest_q), (k, starts_k, longest_k)):
        assert starts.dtype == torch.int32
        assert (starts[0], starts[-1]) == (0, len(x))
        assert starts.diff().max() == longest
        sizes.append(starts.diff().tolist())
    return [x[0] for x in attend(*(x[None] for x in (q, k, v)), *sizes, scaling, left)]


def flash_attn_4():
    def left_of(causal, window_size, return_lse):
        assert (causal, window_size[1], return_lse) == (True, 0, True)
        return -1 if window_size[0] is None else window_size[0]

    def flash_attn_func(q, k, v, *, softmax_scale, **options):
        return attend_whole(q, k, v, softmax_scale, left_of(**options))

    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, **options
    ):
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return attend_packed(q, k, v, *lengths, softmax_scale, left_of(**options))

    return module("flash_attn.cute", flash_attn_func, flash_attn_varlen_func)


def flash_attn_2():
    def left_of(causal, window_size, return_attn_probs):
        assert (causal, window_size[1], return_attn_probs) == (True, 0, True)
        return window_size[0]

    def flash_attn_func(q, k, v, *, softmax_scale, **options):
        return *attend_whole(q, k, v, softmax_scale, left_of(**options)), None

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, **options
    ):
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *attend_packed(q, k, v, *lengths, softmax_scale, left_of(**options)), None

    return module("flash_attn", flash_attn_func, flash_attn_varlen_func)


def varlen_attn_of_2_11(q, k, v, *lengths, return_aux, scale, window_size):
    assert (window_size[1], return_aux.lse) == (0, True)
    return attend_packed(q, k, v, *lengths, scale, window_size[0])


def varlen_attn_of_2_13(q, k, v, *lengths, enable_gqa=False, **options):
    assert enable_gqa or q.shape[1] == k.shape[1]
    return varlen_attn_of_2_11(q, k, v, *lengths, **options)


def module(name, *functions):
    new = ModuleType(name)
    for function in functions:
        setattr(new, function.__name__, function)
    return new


def sinks_triton():
    """The kernels of sinks, by torch's own operations."""

    def parts(sinks, q, k, lse, scaling):
        """Of each chunk of each row: its document, queries, sinks, their sums, and the scores [H, queries, sinks]."""
        num = sinks.tokens.shape[1]
        for row, (start, begin, end, document) in product(range(len(lse)), sinks.chunks.tolist()):
            rows, keys = (row, slice(begin, end)), (row, slice(start, start + num))
            scores = torch.einsum("thd,shd->hts", q[rows], shared(k[keys], q[rows])) * scaling
            i, j = torch.arange(begin, end)[:, None], torch.arange(start, start + num)
            scores = scores.masked_fill(i - j < sinks.window, -torch.inf)
            yield (row, document), rows, keys, lse[row, :, begin:end], scores

    def merge(sinks, q, k, v, out, lse, scaling):
        for _, rows, keys, before, scores in parts(sinks, q, k, lse, scaling):
            merged = torch.logaddexp(before, scores.logsumexp(-1))
            added = torch.einsum("hts,shd->thd", (scores - merged[..., None]).exp(), shared(v[keys], q[rows]))
            out[rows] = out[rows] * (before - merged).exp().T[..., None] + added
            before.copy_(merged)

    def add_gradients(sinks, q, k, v, out, lse, d_out, d_q, scaling):
        d_k, d_v = q.new_zeros(2, len(lse), *sinks.tokens.shape, *k.shape[2:])
        for document, rows, keys, whole, scores in parts(sinks, q, k, lse, scaling):
            weights = (scores - whole[..., None]).exp()
            d_weights = torch.einsum("thd,shd->hts", d_out[rows], shared(v[keys], q[rows]))
            d_scores = weights * (d_weights - (d_out * out)[rows].sum(-1).T[..., None]) * scaling
            d_q[rows] += torch.einsum("hts,shd->thd", d_scores, shared(k[keys], q[rows]))
            d_k[document] += torch.einsum("hts,thd->shd", d_scores, q[rows]).unflatten(1, (k.shape[2], -1)).sum(2)
            d_v[document] += torch.einsum("hts,thd->shd", weights, d_out[rows]).unflatten(1, (k.shape[2], -1)).sum(2)
        return d_k, d_v

    return module("lctrain.kernels.sinks_triton", merge, add_gradients)
