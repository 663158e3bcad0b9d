"""Attention in several calls: what one call would give, and keep."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lctrain.kernels.joined_calls import joined_calls
from lctrain.memory.recall import attend_once, recording, replaying

HEADS, KV_HEADS = [2, 4, 2], [1, 2, 1]
PARTS = [(0.5, HEADS[0], KV_HEADS[0]), (1.0, HEADS[1], KV_HEADS[1]), (2.0, HEADS[2], KV_HEADS[2])]


class Fused(torch.autograd.Function):
    """Keeps its inputs, its output, laid out by token, and a number for each query, as fused kernels do."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        out_BLhD = attention(q, k, v, scale).transpose(1, 2).contiguous()
        flat = out_BLhD.flatten(0, 1)
        ctx.save_for_backward(q, k, v, flat, out_BLhD.sum(-1))
        ctx.scale = scale
        return flat

    @staticmethod
    def backward(ctx, d_flat):
        q, k, v, flat, sums = ctx.saved_tensors
        assert torch.equal(flat.sum(-1), sums.flatten(0, 1))  # the output is what it was
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            again = attention(*inputs, ctx.scale).transpose(1, 2).flatten(0, 1)
            assert torch.equal(again, flat)
            return *torch.autograd.grad(again, inputs, d_flat), None


def attention(q, k, v, scale):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def calls(q, k, v):
    parts = zip(PARTS, q.split(HEADS, 1), k.split(KV_HEADS, 1), v.split(KV_HEADS, 1), strict=True)
    return [
        Fused.apply(*part, scale).unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2) for (scale, *_), *part in parts
    ]


def plain(q, k, v):
    return torch.cat(calls(q, k, v), dim=1)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 16, 8, dtype=torch.float64)  # q, k and v are views of one tensor, laid out by token
    return [x.transpose(1, 2).detach().requires_grad_() for x in hidden.split([8, 4, 4], dim=2)]


def gradients(attend, inputs):
    out = attend(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, torch.autograd.grad((out * weights).sum(), inputs)


def test_equals_the_calls_joined(inputs):
    out, own = gradients(lambda *x: joined_calls(calls, *x), inputs)
    expected, theirs = gradients(plain, inputs)
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).is_contiguous()
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(joined_calls(calls, *inputs), expected)


def test_gradcheck(inputs):
    assert torch.autograd.gradcheck(lambda *x: joined_calls(calls, *x), inputs)


def test_outputs_are_laid_out_by_token(inputs):
    with pytest.raises(AssertionError, match="not laid out by token"):
        joined_calls(lambda *x: [out.contiguous() for out in calls(*x)], *inputs)


def kept(attend, inputs):
    """Bytes that autograd keeps, each once, with what follows keeping the output as a projection does."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        attend(*inputs) * torch.ones(8, dtype=torch.float64, requires_grad=True)
    return sum(storage.nbytes() for storage in storages.values())


def test_keeps_one_output(inputs):
    output = 8 * inputs[0].numel()
    assert kept(plain, inputs) == kept(lambda *x: joined_calls(calls, *x), inputs) + output


@pytest.mark.parametrize("keep", [False, True])
def test_in_a_layer_that_is_recomputed(inputs, keep):
    """Recomputed or kept, attention of several calls is recalled as that of one is."""

    def layer(*x):
        seen = []
        return checkpoint(
            lambda *y: attend_once(lambda *z: joined_calls(calls, *z), *(2 * t for t in y)).sin(),
            *x,
            use_reentrant=False,
            context_fn=lambda: (recording(seen, keep=keep), replaying(seen)),
        )

    out, own = gradients(layer, inputs)
    expected, theirs = gradients(lambda *x: plain(*(2 * t for t in x)).sin(), inputs)
    assert torch.equal(out, expected)
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_nothing_outlives_the_graph(inputs):
    """Neither a cycle nor the calls' graph holds what was computed."""
    gc.disable()
    try:
        scaled = [2 * x for x in inputs]
        out = joined_calls(calls, *scaled)
        watched = [weakref.ref(x) for x in (*scaled, out)]
        out.sum().backward()
        del scaled, out
        assert not any(one() is not None for one in watched)
    finally:
        gc.enable()
