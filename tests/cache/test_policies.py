"""Every policy against its pattern without a cache: any chunks, padded rows, rings that went round."""

import pytest
import torch

LENGTH = 29


def in_chunks(model, cache, tokens, mask, size):
    """The logits of all tokens, a forward for each chunk."""
    logits = []
    for start in range(0, tokens.shape[1], size):
        stop = start + size
        known = None if mask is None else mask[:, :stop]
        positions = None if mask is None else (known.cumsum(1) - 1).clamp(min=0)[:, start:]
        with torch.no_grad():
            out = model(tokens[:, start:stop], attention_mask=known, position_ids=positions, past_key_values=cache)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def in_one_pass(model, tokens, mask=None):
    position_ids = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(tokens, attention_mask=mask, position_ids=position_ids, use_cache=False).logits


def close(found, expected, mask=None):
    real = torch.ones(found.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", ["text", "cache"])
@pytest.mark.parametrize("kv", [4, 1])
@pytest.mark.parametrize("policy", ["full", "streaming", "duo"])
def test_any_chunks_equal_one_pass_under_the_pattern(serving, naive, ids, policy, kv, positions):
    tokens = ids(2, LENGTH)
    expected = in_one_pass(naive(policy, kv=kv, positions=positions), tokens)
    for kernel in ("sdpa", "reference"):
        model, policy_ = serving(policy, kv=kv, positions=positions, kernel=kernel)
        for size in (1, 2, 7, 11, LENGTH):
            close(in_chunks(model, policy_.new(model), tokens, None, size), expected)


@pytest.mark.parametrize("positions", ["text", "cache"])
@pytest.mark.parametrize("policy", ["full", "streaming", "duo"])
def test_padded_rows_keep_their_own_sinks(serving, naive, ids, policy, positions):
    """On the left, as in a batch of prompts, and between, as where a batch of answers is answered."""
    tokens, mask = ids(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :12] = mask[1, :4] = mask[1, 13:18] = 0
    model, policy_ = serving(policy, positions=positions)
    expected = in_one_pass(naive(policy, positions=positions), tokens, mask)
    for size in (1, 4, 7, 11, LENGTH):
        close(in_chunks(model, policy_.new(model), tokens, mask, size), expected, mask)
