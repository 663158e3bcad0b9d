"""What fused kernels compute without a mask, on functions written out in `packages`: the result is that of the mask."""

import gc
import sys
import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lctrain.kernels.flash import FlashKernel
from lctrain.kernels.flash2 import Flash2Kernel
from lctrain.kernels.local import alike
from lctrain.kernels.mask import Local, Mask
from lctrain.kernels.reference import ReferenceKernel
from lctrain.kernels.varlen import VarlenKernel
from lctrain.memory.recall import attend_once, recording, replaying
from tests.kernels import packages

KERNELS = {
    "flash": FlashKernel(),
    "flash2": Flash2Kernel(),
    "varlen, torch 2.11": VarlenKernel(),
    "varlen, torch 2.13": VarlenKernel(),
}


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Each fused kernel on a CPU."""
    for module in (packages.flash_attn_2(), packages.flash_attn_4(), packages.sinks_triton()):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    of_version = packages.varlen_attn_of_2_11 if "2.11" in request.param else packages.varlen_attn_of_2_13
    monkeypatch.setattr("lctrain.kernels.varlen.varlen_attn", of_version)
    monkeypatch.setattr("lctrain.kernels.sinks.MIN_CHUNK", 4)  # several chunks of 20 tokens
    return KERNELS[request.param]


def mask_of(visible, length, *, queries=None, **options):
    """Of 4 heads, 2 of which share a key-value head."""
    queries = queries or length
    return Mask(
        q_length=queries, kv_length=length, num_heads=4, num_key_value_groups=2, head_dim=16,
        device=torch.device("cpu"), dtype=torch.float64, q_offset=length - queries,
        allowed=lambda b, h, q, k: k <= q, visible=visible, **options,
    )  # fmt: skip


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
def test_takes_local_heads_by_themselves(kernel, name, num_rows, starts):
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
    assert isinstance(kernel.prepare(mask), list)
    check(kernel, mask, random_inputs(num_rows))


def check(kernel, mask, inputs):
    """Output and gradients are those of the reference."""
    results = []
    for each in (kernel, ReferenceKernel()):
        out = each.attend(*inputs, each.prepare(mask), scaling=0.3, softcap=None)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_the_last_query_of_a_chunk_meets_the_last_key(kernel, window, num_rows):
    visible = lambda b, h, q, k: q - k < (window or 999)  # noqa: E731
    mask = mask_of(visible, 200, queries=130, local=(Local(window=window),), num_rows=num_rows)
    q, k, v = random_inputs(num_rows, 200)
    check(kernel, mask, (q[:, :, 70:], k, v))


@pytest.mark.parametrize("keep", [False, True])
def test_sinks_in_a_layer_that_is_recomputed(kernel, keep):
    """What is written over the window's output is what the backward finds, kept or computed again."""
    mask = mask_of(lambda b, h, q, k: (q - k < 5) | (k < 3), 20, local=(Local(window=5, num_sinks=3),))
    q, k, v = random_inputs()
    results = []
    for each in (kernel, ReferenceKernel()):
        prepared, calls = each.prepare(mask), []

        def attend(*qkv, each=each, prepared=prepared):
            return each.attend(*qkv, prepared, scaling=0.3, softcap=None)

        def layer(*qkv, attend=attend):
            return attend_once(attend, *(2 * x for x in qkv)).sin()

        def contexts(calls=calls):
            return recording(calls, keep=keep), replaying(calls)

        out = checkpoint(layer, q, k, v, use_reentrant=False, context_fn=contexts)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["sinks", "window"])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_keeps_inputs_one_output_and_a_number_for_each_query(kernel, name, num_rows):
    """Of whole rows."""
    (local,) = LOCAL[name]
    mask = mask_of(lambda b, h, q, k: (q - k < 5) | (k < local.num_sinks), 20, local=(local,), num_rows=num_rows)
    # Laid out by token, as a model's projections leave them.
    q, k, v = (
        x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in random_inputs(num_rows)
    )
    kept = {}

    def pack(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = kernel.attend(q, k, v, kernel.prepare(mask), scaling=0.3, softcap=None)
    tensors = (q, k, v, out, torch.empty(num_rows, 4, 20, dtype=out.dtype))
    assert sum(kept.values()) == sum(8 * x.numel() for x in tensors)


def test_a_backward_that_fails_leaves_nothing(kernel, monkeypatch):
    """As out of memory: its tensors must not hang on each other."""

    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(packages.Fused, "backward", fail)
    mask = mask_of(lambda b, h, q, k: (q - k < 5) | (k < 3), 20, local=LOCAL["sinks"])
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
        assert (alike(mask, LOCAL["sinks"]) is not None) == by_itself


@pytest.mark.parametrize(
    ("length", "queries", "num_sinks", "window"),
    [(20, 20, 6, 5), (3000, 3000, 1200, 1500), (20, 7, 3, 5)],
    ids=["more than the window", "more than a program holds", "a chunk"],
)
def test_other_sinks_need_a_mask(length, queries, num_sinks, window):
    local = (Local(window=window, num_sinks=num_sinks),)
    mask = mask_of(lambda b, h, q, k: (q - k < window) | (k < num_sinks), length, queries=queries, local=local)
    assert alike(mask, local) is None


def test_heads_that_share_keys_and_see_different_things_need_a_mask(kernel):
    mask = mask_of(lambda b, h, q, k: k <= q, 9, local=(Local(), Local(window=3)) * 2)
    assert not isinstance(kernel.prepare(mask), list)
