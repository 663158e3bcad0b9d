"""Every kernel against a softmax written out in fp64, forward and gradients."""

import pytest
import torch

from lctrain.errors import InputError
from lctrain.kernels import sdpa
from lctrain.kernels.base import MaskShape
from lctrain.kernels.choose import choose
from lctrain.kernels.flex import FlexKernel
from lctrain.kernels.reference import ReferenceKernel
from lctrain.kernels.sdpa import SDPAKernel

KERNELS = {"sdpa": SDPAKernel(), "reference": ReferenceKernel()}
NUM_HEADS, DIM = 4, 8


def documents(length):
    """Number of the document of each position: cuts at 1, 40 %, and 41 %."""
    number = torch.zeros(length, dtype=torch.long)
    for cut in (1, int(0.4 * length), int(0.4 * length) + 1):
        number[cut:] += 1
    return number


def mask_mods(length):
    """Patterns over (b, h, q, k) that leave no query without a key."""
    document = documents(length)
    noise = torch.rand(2, NUM_HEADS, length, length, generator=torch.Generator().manual_seed(1)) < 0.2
    half, group = NUM_HEADS // 2, 2 * max(1, length // 8)

    def s2(b, h, q, k):
        shift = (h >= half) * (group // 2)
        return (q + shift) // group == (k + shift) // group

    patterns = {
        "causal": lambda b, h, q, k: k <= q,
        "window": lambda b, h, q, k: q - k < 7,
        "streaming": lambda b, h, q, k: (k < 3) | (q - k < 5),
        "s2": s2,
        "packed": lambda b, h, q, k: document[q] == document[k],
        "packed s2": lambda b, h, q, k: (document[q] == document[k]) & s2(b, h, q, k),
        "rows differ": lambda b, h, q, k: q - k < 3 + 20 * b,
        "random": lambda b, h, q, k: noise[b, h, q, k] | (q == k),
    }
    return {name: lambda b, h, q, k, p=p: (k <= q) & p(b, h, q, k) for name, p in patterns.items()}


def naive(q, k, v, mask, scaling, softcap):
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = torch.where(mask, scores, torch.tensor(float("-inf"), dtype=scores.dtype))
    weights = (weights - weights.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def check(
    kernel, mask_mod, length, num_kv, *, dtype=torch.float32, softcap=None, batch=2, queries=None, heads_differ=True
):
    """Last `queries` of `length` positions attend; output and gradients against `naive`."""
    generator = torch.Generator().manual_seed(0)
    queries = queries or length
    q = torch.randn(batch, NUM_HEADS, queries, DIM, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(batch, num_kv, length, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    upstream = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    shape = MaskShape(
        batch=batch, num_heads=NUM_HEADS if heads_differ else 1, num_key_value_groups=NUM_HEADS // num_kv,
        q_length=queries, kv_length=length, device=q.device, dtype=dtype,
    )  # fmt: skip
    offset = length - queries
    prepared = mask_mod and kernel.prepare(lambda b, h, i, j: mask_mod(b, h, i + offset, j), shape)
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (batch, NUM_HEADS, queries, length)), indexing="ij")
    mask = (mask_mod or (lambda b, h, q, k: k <= q))(b, h, i + offset, j)
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = naive(*exact, mask, 0.3, softcap)
    expected.backward(upstream)
    given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out = kernel.attend(*given, prepared, scaling=0.3, softcap=softcap)
    out.backward(upstream.to(dtype))
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for name, a, e in zip("qkv", given, exact, strict=True):
        torch.testing.assert_close(
            a.grad.double(), e.grad, rtol=tolerance, atol=5 * tolerance, msg=lambda m, n=name: f"d{n}: {m}"
        )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_kv", [4, 2, 1])
@pytest.mark.parametrize("pattern", mask_mods(8))
@pytest.mark.parametrize("length", [1, 37])
def test_equals_a_naive_softmax(monkeypatch, kernel, num_kv, pattern, length):
    monkeypatch.setattr(sdpa, "TILE", 16)
    check(KERNELS[kernel], mask_mods(length)[pattern], length, num_kv, dtype=torch.float64)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", ["window", "packed s2"])
def test_at_the_tile_that_ships(kernel, pattern):
    assert 1100 % sdpa.TILE
    check(KERNELS[kernel], mask_mods(1100)[pattern], 1100, 2, batch=1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_kv", [4, 2, 1])
def test_plain_causal_needs_no_mask(kernel, num_kv):
    check(KERNELS[kernel], None, 37, num_kv)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", ["causal", "streaming", "s2"])
def test_fewer_queries_than_keys(monkeypatch, kernel, pattern):
    monkeypatch.setattr(sdpa, "TILE", 4)
    for queries in (1, 5, 36):
        check(KERNELS[kernel], mask_mods(37)[pattern], 37, 2, queries=queries)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mask_of_one_head_serves_all(kernel):
    check(KERNELS[kernel], mask_mods(37)["window"], 37, 2, heads_differ=False)


@pytest.mark.parametrize("pattern", ["causal", "s2"])
def test_reference_caps_scores(pattern):
    check(KERNELS["reference"], mask_mods(37)[pattern], 37, 2, dtype=torch.float64, softcap=0.5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_stays_near(kernel):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 33, 8, generator=generator) for _ in range(3))
    low = [x.bfloat16() for x in (q, k, v)]
    shape = MaskShape(
        batch=1, num_heads=1, num_key_value_groups=1, q_length=33, kv_length=33, device=q.device, dtype=torch.bfloat16
    )
    mask_mod = mask_mods(33)["window"]
    out = KERNELS[kernel].attend(*low, KERNELS[kernel].prepare(mask_mod, shape), scaling=0.3, softcap=None)
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (1, 4, 33, 33)), indexing="ij")
    expected = naive(*(x.double() for x in low), mask_mod(b, h, i, j), 0.3, None)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_sdpa_reads_only_what_a_tile_sees(monkeypatch):
    """A window costs its width, and a group only its own keys, head by head."""
    monkeypatch.setattr(sdpa, "TILE", 8)
    shape = MaskShape(
        batch=1,
        num_heads=4,
        num_key_value_groups=2,
        q_length=64,
        kv_length=64,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    tiles = SDPAKernel().prepare(mask_mods(64)["window"], shape)
    assert len(tiles) == 8
    assert max(tile.kv.stop - tile.kv.start for tile in tiles) == 8 + 7 - 1
    groups = SDPAKernel().prepare(mask_mods(64)["s2"], shape)  # groups of 16, shifted by 8 in the last two heads
    assert {(tile.q_heads.start, tile.q_heads.stop, tile.kv_heads.start) for tile in groups} == {
        (0, 2, 0),
        (2, 4, 1),
        (0, 4, 0),
    }
    assert max(tile.kv.stop - tile.kv.start for tile in groups) == 16


class TestChoose:
    @pytest.mark.parametrize(
        ("softcap", "device", "expected"),
        [(None, "cpu", "sdpa"), (50.0, "cpu", "reference"), (None, "cuda", "flex"), (50.0, "cuda", "flex")],
    )
    def test_auto(self, softcap, device, expected):
        assert choose("auto", softcap=softcap, device_type=device)[0] == expected

    @pytest.mark.parametrize("name", ["sdpa", "reference"])
    def test_by_name(self, name):
        chosen, kernel = choose(name, softcap=None, device_type="cpu")
        assert chosen == name
        assert type(kernel) is type(KERNELS[name])

    def test_refusals_name_the_kernel(self):
        with pytest.raises(InputError, match="no kernel 'fast'; choose auto, flex, sdpa, reference"):
            choose("fast", softcap=None, device_type="cpu")
        with pytest.raises(InputError, match="kernel=flex needs a CUDA device"):
            choose("flex", softcap=None, device_type="cpu")
        with pytest.raises(InputError, match="kernel=sdpa can't cap attention scores"):
            choose("sdpa", softcap=50.0, device_type="cpu")


def test_flex_computes_few_queries_as_they_stand():
    """Decoding compiles no kernel, so this path runs without a card too."""
    shape = MaskShape(
        batch=1, num_heads=1, num_key_value_groups=2, q_length=3, kv_length=9,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    q, k, v = (torch.randn(1, heads, length, 16) for heads, length in ((4, 3), (2, 9), (2, 9)))
    outs = []
    for kernel in (FlexKernel(), SDPAKernel()):
        prepared = kernel.prepare(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + 6, shape)
        outs.append(kernel.attend(q, k, v, prepared, scaling=0.25, softcap=None))
    torch.testing.assert_close(*outs)
