"""On a card: every kernel against the reference in fp32, forward and gradients, for every static pattern.

`pytest -n 8 tests/gpu` compiles eight kernels at a time.
"""

import warnings
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lctrain.attention.bigbird import BigBird
from lctrain.attention.duo import DuoAttention
from lctrain.attention.full import FullAttention
from lctrain.attention.shifted_sparse import ShiftedSparseAttention
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.attention.streaming import StreamingAttention
from lctrain.benchmark.kernels import Heads, row_mask
from lctrain.kernels.base import Demand
from lctrain.kernels.choose import KERNELS
from lctrain.kernels.local import LocalKernel
from lctrain.kernels.reference import ReferenceKernel
from lctrain.model.install import install

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

METHODS = {
    "full": FullAttention(),
    "sliding_window": SlidingWindowAttention(sliding_window=200),
    "streaming": StreamingAttention(num_sink_tokens=4, recent_size=150),
    "shifted_sparse": ShiftedSparseAttention(group_size_ratio=None, group_size=256),
}
FUSED = [name for name, kernel in KERNELS.items() if issubclass(kernel, LocalKernel)]
COMPOSED = {"duo": DuoAttention(num_sink_tokens=4, recent_size=150, initial_gate=0.5, clamp=True)}
SHAPES = {  # every head dimension at 4 query heads a key-value head, every such group at head dimension 128
    "64": Heads(num_attention_heads=8, num_key_value_heads=2, head_dim=64),
    "96": Heads(num_attention_heads=8, num_key_value_heads=2, head_dim=96),
    "128": Heads(num_attention_heads=8, num_key_value_heads=2, head_dim=128),
    "256": Heads(num_attention_heads=8, num_key_value_heads=2, head_dim=256),
    "128-gqa1": Heads(num_attention_heads=8, num_key_value_heads=8, head_dim=128),
    "128-gqa8": Heads(num_attention_heads=16, num_key_value_heads=2, head_dim=128),
}


def kernel_for(name, heads, *, softcap=None):
    """The kernel, or a skip that says why it refuses."""
    demand = Demand(device_type="cuda", dtype=torch.bfloat16, head_dim=heads.head_dim, softcap=softcap)
    if reason := KERNELS[name].refusal(demand):
        pytest.skip(f"kernel={name} {reason}")
    return KERNELS[name]()


def run(kernel, mask, inputs, dtype, softcap=None):
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs[:3])
    scaling = q.shape[-1] ** -0.5
    out = kernel.attend(q, k, v, kernel.prepare(replace(mask, dtype=dtype)), scaling=scaling, softcap=softcap)
    out.backward(inputs[3].to(dtype))
    return [out.detach(), q.grad, k.grad, v.grad]


def check(name, mask, heads, softcap=None):
    """bf16 keeps 8 bits, a relative error of 2**-9 an operand; sums over hundreds of keys stay below 1e-2."""
    generator = torch.Generator("cuda").manual_seed(0)
    queries, keys = (heads.num_attention_heads, mask.q_length), (heads.num_key_value_heads, mask.kv_length)
    inputs = [
        torch.randn(mask.num_rows, length, n, heads.head_dim, device="cuda", generator=generator)
        .bfloat16()
        .transpose(1, 2)
        for n, length in (queries, keys, keys, queries)
    ]
    expected = run(ReferenceKernel(), mask, inputs, torch.float32, softcap)
    actual = run(kernel_for(name, heads, softcap=softcap), mask, inputs, torch.bfloat16, softcap)
    for what, got, want in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        error = torch.linalg.norm(got.float() - want) / torch.linalg.norm(want)
        assert error < 1e-2, f"{what}: {error}"


@pytest.mark.parametrize("documents", [[1000], [300, 1, 699]], ids=["alone", "packed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kernel", [*FUSED, "flex", "sdpa"])
def test_equals_the_reference(kernel, method, shape, documents):
    kernel_for(kernel, SHAPES[shape])
    check(kernel, row_mask(METHODS[method], 1000, SHAPES[shape], documents, "cuda"), SHAPES[shape])


@pytest.mark.parametrize("documents", [[1000], [300, 1, 699]], ids=["alone", "packed"])
@pytest.mark.parametrize(("shape", "num_sinks"), [("64", 200), ("128", 100), ("256", 64)])
@pytest.mark.parametrize("kernel", FUSED)
def test_many_sinks_and_rows(kernel, shape, num_sinks, documents):
    kernel_for(kernel, SHAPES[shape])
    method = StreamingAttention(num_sink_tokens=num_sinks, recent_size=200)
    mask = replace(row_mask(method, 1000, SHAPES[shape], documents, "cuda"), num_rows=2)
    assert isinstance(KERNELS[kernel]().prepare(mask), list)  # no mask
    check(kernel, mask, SHAPES[shape])


@pytest.mark.parametrize("method", ["full", "sliding_window"])
@pytest.mark.parametrize("kernel", [*FUSED, "flex"])
def test_a_chunk_after_other_keys(kernel, method):
    """The last query meets the last key, in two rows."""
    whole = row_mask(METHODS[method], 1000, SHAPES["128"], [1000], "cuda")
    check(kernel, replace(whole, q_length=300, q_offset=700, num_rows=2), SHAPES["128"])


@pytest.mark.parametrize("method", ["full", "streaming"])
def test_flex_caps_scores(method):
    check("flex", row_mask(METHODS[method], 1000, SHAPES["128"], [1000], "cuda"), SHAPES["128"], softcap=2.0)


@pytest.mark.parametrize("kernel", ["flash", "flex"])
def test_a_pattern_without_bounds(kernel):
    """More than arithmetic: which of 50 buckets a position falls into is read from a table."""
    kernel_for(kernel, SHAPES["128"])
    bucket = torch.randint(0, 50, (1000,), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    mask = row_mask(METHODS["full"], 1000, SHAPES["128"], [1000], "cuda")
    visible = lambda b, h, q, k: (bucket[q] == bucket[k]) | (q - k < 9)  # noqa: E731
    check(kernel, replace(mask, visible=visible, local=None), SHAPES["128"])


@pytest.mark.parametrize("documents", [[1000], [300, 1, 699]], ids=["alone", "packed"])
@pytest.mark.parametrize("kernel", ["flash", "flex"])
def test_columns_that_each_head_looks_up(kernel, documents):
    bigbird = BigBird(block_size=32, num_global_blocks=1, num_window_blocks=2, num_random_blocks=2, seed=0)
    check(kernel, row_mask(bigbird, 1000, SHAPES["128"], documents, "cuda"), SHAPES["128"])


@pytest.mark.parametrize("kernel", ["flash", "flex"])
def test_larger_blocks_of_queries(kernel, monkeypatch):
    """As at a million tokens, where lists of keys would be too large."""
    monkeypatch.setattr("lctrain.kernels.block_mask.MAX_LIST_BYTES", 3600)  # of 4096 by blocks of 128
    kernel_for(kernel, SHAPES["128"])
    mask = replace(row_mask(METHODS["shifted_sparse"], 2000, SHAPES["128"], [2000], "cuda"), local=None)
    assert KERNELS[kernel]().prepare(mask).BLOCK_SIZE[0] == 256
    check(kernel, mask, SHAPES["128"])


def model(method, kernel, num_layers=2):
    """A random Llama in bf16."""
    kernel_for(kernel, SHAPES["64"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=256, num_hidden_layers=num_layers, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    install(llama, (METHODS | COMPOSED)[method], kernel)
    return llama


def step(llama, documents):
    positions = torch.cat([torch.arange(n) for n in documents])[None].cuda()
    tokens = torch.randint(0, 64, positions.shape, generator=torch.Generator().manual_seed(len(documents))).cuda()
    logits = llama(input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits
    logits.float().square().mean().backward()


@pytest.mark.parametrize("method", ["full", "streaming", "shifted_sparse", "duo"])
@pytest.mark.parametrize("kernel", [*FUSED, "flex"])
def test_a_stage_compiles_in_its_first_step(kernel, method):
    """Documents differ from batch to batch; what was compiled for the first serves all of a length."""
    llama = model(method, kernel)
    step(llama, [500, 1548])
    with torch.compiler.set_stance("fail_on_recompile"):
        for documents in ([1000, 1048], [100] * 20 + [48], [2047, 1]):
            step(llama, documents)


@pytest.mark.parametrize("method", ["full", "streaming", "duo"])
@pytest.mark.parametrize("kernel", [*FUSED, "flex"])
def test_layers_never_wait_for_the_card(kernel, method):
    """A forward may ask once what its documents are; more layers do not ask more often."""

    def waits(num_layers):
        llama = model(method, kernel, num_layers)
        step(llama, [500, 1548])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                step(llama, [1000, 1048])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in seen)

    assert waits(6) == waits(2)


@pytest.mark.parametrize("kernel", [*FUSED, "flex"])
@pytest.mark.parametrize("method", METHODS)
def test_decode_is_prefill(kernel, method):
    llama = model(method, kernel).eval()
    tokens = torch.randint(0, 64, (1, 300), generator=torch.Generator().manual_seed(0)).cuda()
    cache, parts = None, []
    with torch.no_grad():
        expected = llama(input_ids=tokens).logits
        for part in tokens.split([256, 40, 1, 1, 2], dim=1):
            out = llama(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert torch.linalg.norm((torch.cat(parts, 1) - expected).float()) < 2e-2 * torch.linalg.norm(expected.float())


@pytest.mark.parametrize("method", ["sliding_window", "streaming", "shifted_sparse"])
@pytest.mark.parametrize("kernel", FUSED)
def test_keeps_what_full_attention_keeps(kernel, method):
    """The inputs, one output and a sum per query, however many calls the heads take."""
    heads, kernel = SHAPES["128-gqa8"], kernel_for(kernel, SHAPES["128-gqa8"])

    def kept(name):
        mask = row_mask(METHODS[name], 2**14, heads, [2**14], "cuda")
        q, k, v = (
            torch.zeros(1, 2**14, n, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True).transpose(1, 2)
            for n in (heads.num_attention_heads, heads.num_key_value_heads, heads.num_key_value_heads)
        )
        prepared, before = kernel.prepare(replace(mask, dtype=torch.bfloat16)), torch.cuda.memory_allocated()
        out = kernel.attend(q, k, v, prepared, scaling=0.1, softcap=None)
        return torch.cuda.memory_allocated() - before, out

    full, _ = kept("full")
    assert kept(method)[0] <= 1.02 * full


@pytest.mark.parametrize("method", [StreamingAttention(num_sink_tokens=64, recent_size=4096), ShiftedSparseAttention()])
def test_masks_of_a_million_tokens_take_less_than_a_gibibyte(method):
    heads = Heads(num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    mask = row_mask(method, 2**20, heads, [2**19 - 1, 2**19 + 1], "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    prepared = KERNELS["flex"]().prepare(mask)
    assert torch.cuda.max_memory_allocated() - before < 2**30
    assert prepared.shape[-2:] == (2**20, 2**20)
