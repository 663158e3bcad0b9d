"""On a card: caches on every kernel against the pattern in one pass, and CUDA graphs against a step as it is."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lctrain.attention.full import FullAttention
from lctrain.attention.head_pattern import HeadPatternAttention
from lctrain.cache.base import prefill
from lctrain.cache.duo import DuoCache
from lctrain.cache.full import FullCache
from lctrain.heads import HeadPattern
from lctrain.kernels.base import Demand
from lctrain.kernels.choose import KERNELS
from lctrain.model.decode import GreedyDecoder
from lctrain.model.install import install

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTH = 1500
PATTERN = HeadPattern.from_gates([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], threshold=0.5, num_sink_tokens=4, recent_size=60)
POLICIES = {
    "full": FullCache(),
    "duo": DuoCache(pattern=PATTERN, positions="text"),
    "duo in the cache": DuoCache(pattern=PATTERN, positions="cache"),
}


def random_model(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=256, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


@pytest.fixture
def model():
    return random_model()


@pytest.fixture
def tokens():
    return torch.randint(2, 64, (1, LENGTH), generator=torch.Generator().manual_seed(0)).cuda()


def on(model, kernel, method=None):
    demand = Demand(device_type="cuda", dtype=torch.bfloat16, head_dim=64, softcap=None)
    if reason := KERNELS[kernel].refusal(demand):
        pytest.skip(f"kernel={kernel} {reason}")
    install(model, method or FullAttention(), kernel)


def logits(model, policy, tokens, sizes):
    cache = policy.new(model)
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in tokens.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("kernel", ["flash", "cudnn", "varlen", "flash2", "flex", "sdpa"])
@pytest.mark.parametrize("policy", ["full", "duo"])
def test_chunks_equal_one_pass_under_the_pattern(model, tokens, tmp_path, policy, kernel):
    PATTERN.write_json(tmp_path / "head_pattern.json")
    pattern = HeadPatternAttention(
        path=str(tmp_path), threshold=None, streaming_share=None, num_sink_tokens=None, recent_size=None
    )
    on(model, "reference", pattern if policy == "duo" else FullAttention())
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits.float()
    on(model, kernel)
    found = logits(model, POLICIES[policy], tokens, [512, 512, 256, 128, 90, 1, 1])
    assert torch.linalg.norm(found - expected) < 2e-2 * torch.linalg.norm(expected)


@pytest.mark.parametrize("kernel", ["flash", "varlen", "flash2", "flex"])
def test_positions_in_the_cache_on_a_doubled_head(model, tokens, kernel):
    on(model, "reference")
    expected = logits(model, POLICIES["duo in the cache"], tokens, [1] * LENGTH).float()
    on(model, kernel)
    found = logits(model, POLICIES["duo in the cache"], tokens, [512, 512, 256, 128, 90, 1, 1])
    assert torch.linalg.norm(found - expected) < 2e-2 * torch.linalg.norm(expected)


@pytest.mark.parametrize("policy", ["full", "duo"])
def test_graphs_decode_what_a_step_decodes(tokens, policy):
    """To the bit: the same kernels on the same numbers."""
    model = random_model(initializer_range=0.1)  # says something else each time; with less it soon repeats itself
    on(model, "flex")
    decoded = []
    for graphs in (False, True):
        cache = POLICIES[policy].new(model, LENGTH + 40)
        prefill(model, tokens, None, cache, 512)
        step = GreedyDecoder(model, cache, tokens[:, -1:], graphs=graphs)
        decoded.append(torch.cat([step().clone() for _ in range(40)], dim=1))
    assert torch.equal(*decoded)
    assert decoded[0].unique().numel() > 10


@pytest.mark.parametrize("kernel", ["flash", "cudnn", "varlen", "flash2"])
def test_prompts_of_any_length_compile_nothing_anew(model, tokens, kernel):
    """Only whole chunks and powers of two reach what is compiled."""
    on(model, kernel)
    prefill(model, tokens[:, :1459], None, POLICIES["duo"].new(model), 512)
    with torch.compiler.set_stance("fail_on_recompile"):
        prefill(model, tokens, None, POLICIES["duo"].new(model), 512)
