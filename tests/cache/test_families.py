"""Other models than Llama: what a duo cache gives in chunks is what attention by the same pattern gives in one pass."""

import pytest
import torch

from lctrain.attention.full import FullAttention
from lctrain.attention.head_pattern import HeadPatternAttention
from lctrain.cache.duo import DuoCache
from lctrain.heads import HeadPattern
from lctrain.model.install import install

PATTERN = HeadPattern.from_gates([[0.9, 0.1], [0.2, 0.3]], threshold=0.5, num_sink_tokens=2, recent_size=5)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "phi3", "gemma", "cohere"])
def test_chunks_equal_the_pattern_in_one_pass(tiny, ids, tmp_path, model_type):
    window = {"sliding_window": None} if model_type in ("mistral", "phi3") else {}
    model, tokens = tiny(model_type, **window), ids(2, 25)
    PATTERN.write_json(tmp_path / "head_pattern.json")
    pattern = HeadPatternAttention(
        path=str(tmp_path), threshold=None, streaming_share=None, num_sink_tokens=None, recent_size=None
    )
    with torch.no_grad():
        install(model, pattern)
        expected = model(tokens, use_cache=False).logits
        install(model, FullAttention())
        cache = DuoCache(pattern=PATTERN, positions="text").new(model)
        found = torch.cat([model(part, past_key_values=cache).logits for part in tokens.split([9, 7, 8, 1], 1)], 1)
        full = model(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (full - expected).abs().max() > 1e-3
