"""Every kernel against a softmax written out in fp64, forward and gradients."""

import pytest
import torch

from lctrain.errors import InputError
from lctrain.kernels import flash, flash2, sdpa
from lctrain.kernels.base import Demand
from lctrain.kernels.choose import choose
from lctrain.kernels.cudnn import CudnnKernel
from lctrain.kernels.flash import FlashKernel
from lctrain.kernels.flash2 import Flash2Kernel
from lctrain.kernels.flex import FlexKernel
from lctrain.kernels.mask import Local, Mask
from lctrain.kernels.reference import ReferenceKernel
from lctrain.kernels.sdpa import SDPAKernel
from lctrain.kernels.varlen import VarlenKernel

KERNELS = {"sdpa": SDPAKernel(), "reference": ReferenceKernel()}
ON_CARDS = [FlashKernel(), CudnnKernel(), VarlenKernel(), Flash2Kernel(), FlexKernel()]
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


def mask_of(mask_mod, queries, length, *, heads=1, groups=1, dtype=torch.float32, batch=1):
    """As installed: a pattern that looks at the batch does so through a table. None is plain causal."""
    rows = torch.zeros(batch, length, dtype=torch.int32)
    return Mask(
        q_length=queries, kv_length=length, num_heads=heads, num_key_value_groups=groups, head_dim=DIM,
        device=torch.device("cpu"), dtype=dtype, q_offset=length - queries,
        allowed=lambda b, h, q, k: k <= q,
        visible=mask_mod or (lambda b, h, q, k: k <= q),
        documents=None if mask_mod is None or batch == 1 else (rows[:, length - queries :], rows),
        local=(Local(),) if mask_mod is None else None,
    )  # fmt: skip


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
    offset = length - queries
    mask = mask_of(
        mask_mod, queries, length, heads=NUM_HEADS if heads_differ else 1, groups=NUM_HEADS // num_kv, dtype=dtype,
        batch=batch,
    )  # fmt: skip
    prepared = kernel.prepare(mask)
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
@pytest.mark.parametrize("queries", [37, 5, 1])
def test_plain_causal_needs_no_mask(kernel, num_kv, queries):
    check(KERNELS[kernel], None, 37, num_kv, queries=queries)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("num_kv", [4, 2, 1])
@pytest.mark.parametrize("pattern", [None, "window", "s2", "rows differ"])
@pytest.mark.parametrize("kernel", ON_CARDS)
def test_few_queries_need_no_card(kernel, num_kv, pattern, queries):
    """Decoding compiles nothing; query heads that share keys are computed together."""
    mask_mod = pattern and mask_mods(37)[pattern]
    check(kernel, mask_mod, 37, num_kv, queries=queries, heads_differ=pattern == "s2", dtype=torch.float64)


@pytest.mark.parametrize("queries", [1, 5])
def test_few_queries_may_have_capped_scores(queries):
    check(FlexKernel(), None, 37, 2, queries=queries, dtype=torch.float64, softcap=0.5)


def test_one_query_that_sees_all_asks_for_no_mask():
    for kernel in ON_CARDS:
        assert kernel.prepare(mask_of(None, 1, 37)).mask is None
    assert SDPAKernel().prepare(mask_of(None, 1, 37)) is None


def test_a_chunk_after_other_keys_is_masked_by_no_table():
    """Fused kernels and torch's lower right mask take it from the lengths."""
    for kernel in (FlashKernel(), VarlenKernel(), Flash2Kernel()):
        (part,) = kernel.prepare(mask_of(None, 200, 537))
        assert (part.window, part.cu_seqlens) == (None, None)
    q, k, v = (torch.randn(1, heads, length, 16) for heads, length in ((4, 200), (2, 537), (2, 537)))
    outs = []
    for kernel in (CudnnKernel(), SDPAKernel()):
        prepared = kernel.prepare(mask_of(None, 200, 537, groups=2))
        outs.append(kernel.attend(q, k, v, prepared, scaling=0.25, softcap=None))
    torch.testing.assert_close(*outs)


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
    mask_mod = mask_mods(33)["window"]
    prepared = KERNELS[kernel].prepare(mask_of(mask_mod, 33, 33, dtype=torch.bfloat16))
    out = KERNELS[kernel].attend(*low, prepared, scaling=0.3, softcap=None)
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (1, 4, 33, 33)), indexing="ij")
    expected = naive(*(x.double() for x in low), mask_mod(b, h, i, j), 0.3, None)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_sdpa_reads_only_what_a_tile_sees(monkeypatch):
    """A window costs its width, and a group only its own keys, head by head."""
    monkeypatch.setattr(sdpa, "TILE", 8)
    tiles = SDPAKernel().prepare(mask_of(mask_mods(64)["window"], 64, 64, heads=4, groups=2))
    assert len(tiles) == 8
    assert max(tile.kv.stop - tile.kv.start for tile in tiles) == 8 + 7 - 1
    groups = SDPAKernel().prepare(
        mask_of(mask_mods(64)["s2"], 64, 64, heads=4, groups=2)
    )  # groups of 16, shifted by 8 in the last two heads
    assert {(tile.q_heads.start, tile.q_heads.stop, tile.kv_heads.start) for tile in groups} == {
        (0, 2, 0),
        (2, 4, 1),
        (0, 4, 0),
    }
    assert max(tile.kv.stop - tile.kv.start for tile in groups) == 16


def demand(device="cpu", *, softcap=None, dtype=torch.bfloat16, head_dim=128):
    return Demand(device_type=device, dtype=dtype, head_dim=head_dim, softcap=softcap)


class TestChoose:
    @pytest.fixture(autouse=True)
    def _without_a_card(self, monkeypatch):
        """What a plan for another machine sees, wherever the tests run."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    @pytest.mark.parametrize("installed", [True, False])
    @pytest.mark.parametrize(
        ("asked", "fastest", "without_packages"),
        [
            (demand("cuda"), "flash", "cudnn"),
            (demand("cuda", head_dim=96), "flash", "cudnn"),
            (demand("cuda", head_dim=256), "flash", "varlen"),
            (demand("cuda", head_dim=80), "cudnn", "cudnn"),
            (demand("cuda", softcap=50.0), "flex", "flex"),
            (demand("cuda", dtype=torch.float32), "flex", "flex"),
            (demand(), "sdpa", "sdpa"),
            (demand(softcap=50.0), "reference", "reference"),
        ],
    )
    def test_auto_takes_the_fastest_that_can(self, monkeypatch, installed, asked, fastest, without_packages):
        monkeypatch.setattr(flash, "has_flash_attn_4", lambda: installed or None)
        monkeypatch.setattr(flash2, "installed_version", lambda: "2.8.3" if installed else None)
        assert choose("auto", asked)[0] == (fastest if installed else without_packages)

    @pytest.mark.parametrize("name", ["sdpa", "reference"])
    def test_by_name(self, name):
        chosen, kernel = choose(name, demand())
        assert chosen == name
        assert type(kernel) is type(KERNELS[name])

    @pytest.mark.parametrize(
        ("name", "asked", "reason"),
        [
            ("fast", demand(), "no kernel 'fast'; choose auto, flash, cudnn, flash2, varlen, flex, sdpa, reference"),
            ("flash", demand(), "kernel=flash needs a CUDA device"),
            ("cudnn", demand(), "kernel=cudnn needs a CUDA device"),
            ("varlen", demand(), "kernel=varlen needs a CUDA device"),
            ("flash2", demand(), "kernel=flash2 needs a CUDA device"),
            ("flex", demand(), "kernel=flex needs a CUDA device"),
            ("sdpa", demand(softcap=50.0), "kernel=sdpa can't cap attention scores"),
            ("cudnn", demand("cuda", softcap=50.0), "kernel=cudnn can't cap attention scores"),
            (
                "cudnn",
                demand("cuda", head_dim=256),
                "head dimensions up to 128 that 8 divides, not torch.bfloat16 and 256",
            ),
            ("cudnn", demand("cuda", dtype=torch.float32), "kernel=cudnn needs bfloat16 or float16"),
            ("varlen", demand("cuda", softcap=50.0), "kernel=varlen can't cap attention scores"),
            ("varlen", demand("cuda", head_dim=264), "head dimensions up to 256 that 8 divides, not torch.bfloat16"),
            ("varlen", demand("cuda", head_dim=100), "head dimensions up to 256 that 8 divides, not torch.bfloat16"),
            ("varlen", demand("cuda", dtype=torch.float32), "kernel=varlen needs bfloat16 or float16"),
            ("flash", demand("cuda"), r"needs flash-attn-4: pip install 'lctrain\[flash-attn-4\]'"),
            ("flash2", demand("cuda"), r"needs flash-attn 2.8, built on the card's host: pip install .*\[flash-attn\]"),
        ],
    )
    def test_what_cannot_run_is_refused_with_the_reason(self, monkeypatch, name, asked, reason):
        monkeypatch.setattr(flash, "has_flash_attn_4", lambda: None)
        monkeypatch.setattr(flash2, "installed_version", lambda: None)
        with pytest.raises(InputError, match=reason):
            choose(name, asked)

    @pytest.mark.parametrize(
        ("name", "asked", "reason"),
        [
            ("flash", demand("cuda", softcap=50.0), "can't cap attention scores"),
            ("flash", demand("cuda", dtype=torch.float32), "needs bfloat16 or float16 .* not torch.float32"),
            (
                "flash",
                demand("cuda", head_dim=80),
                "needs .* dimensions of 64, 96, 128, 256, not torch.bfloat16 and 80",
            ),
            ("flash2", demand("cuda", softcap=50.0), "can't cap attention scores"),
            ("flash2", demand("cuda", dtype=torch.float32), "needs bfloat16 or float16 .* not torch.float32"),
            ("flash2", demand("cuda", head_dim=100), "needs .* up to 256 that 8 divides, not torch.bfloat16 and 100"),
        ],
    )
    def test_packages_refuse_what_they_cannot_compute(self, monkeypatch, name, asked, reason):
        monkeypatch.setattr(flash, "has_flash_attn_4", lambda: True)
        monkeypatch.setattr(flash2, "installed_version", lambda: "2.8.3.post2")
        with pytest.raises(InputError, match=f"kernel={name} {reason}"):
            choose(name, asked)

    @pytest.mark.parametrize(
        ("name", "capability", "reason"),
        [
            ("flash", (8, 0), "runs on Hopper, not on a card"),
            ("cudnn", (7, 5), "runs from Ampere on, not on a card"),
            ("varlen", (7, 5), "runs from Ampere on, not on a card"),
            ("flash2", (7, 5), "runs from Ampere on, not on a card"),
        ],
    )
    def test_other_cards_are_refused(self, monkeypatch, name, capability, reason):
        monkeypatch.setattr(flash, "has_flash_attn_4", lambda: True)
        monkeypatch.setattr(flash2, "installed_version", lambda: "2.8.3")
        for module, function, value in [
            (torch.cuda, "is_available", True),
            (torch.cuda, "get_device_capability", capability),
            (torch.cuda, "get_device_name", "a card"),
            (torch.backends.cuda, "is_flash_attention_available", True),
            (torch.backends.cudnn, "is_available", True),
        ]:
            monkeypatch.setattr(module, function, lambda value=value: value)
        with pytest.raises(InputError, match=f"kernel={name} {reason}"):
            choose(name, demand("cuda"))
