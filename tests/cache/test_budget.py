"""What holds for every policy that evicts, seen through scores of these tests."""

import math
from dataclasses import dataclass

import pytest
import torch

from lctrain.attention.full import FullAttention
from lctrain.cache import seen
from lctrain.cache.allocation import pyramid
from lctrain.cache.base import prefill
from lctrain.cache.budget import BudgetCache
from lctrain.cache.layer import before
from lctrain.cache.seen import Seen
from lctrain.cache.streaming import StreamingCache
from lctrain.errors import InputError
from lctrain.model.install import install


@dataclass(frozen=True, kw_only=True)
class Oldest(BudgetCache):
    """Keeps the first tokens beside the last."""

    def score(self, seen):
        return -seen.positions


@dataclass(frozen=True, kw_only=True)
class Counted(BudgetCache):
    """Counts the forwards that have seen each token; all new tokens are better than all kept ones."""

    def score(self, seen):
        return seen.scores - 1


def of(policy=Oldest, budget=8, recent_size=5, pyramid_beta=1):
    return policy(budget=budget, recent_size=recent_size, pyramid_beta=pyramid_beta)


@pytest.fixture
def model(tiny):
    model = tiny("llama").double()
    install(model, FullAttention(), "sdpa")
    return model


def read(model, cache, tokens, mask, *sizes):
    """The logits of forwards that read so many tokens each."""
    logits, start = [], 0
    for size in sizes:
        known = None if mask is None else mask[:, : start + size]
        positions = None if mask is None else (known.cumsum(1) - 1).clamp(min=0)[:, start:]
        with torch.no_grad():
            out = model(
                tokens[:, start : start + size],
                attention_mask=known,
                position_ids=positions,
                past_key_values=cache,
            )
        logits.append(out.logits)
        start += size
    return torch.cat(logits, dim=1)


def stores(cache):
    return [part.store for layer in cache.layers for part in layer.parts]


def test_the_first_and_the_last_token_by_token_are_a_streaming_cache(model, ids):
    """A query sees the tokens that are kept and itself."""
    streaming = StreamingCache(num_sink_tokens=3, recent_size=6, positions="text")
    found, expected = (
        read(model, policy.new(model), ids(2, 30), None, *[1] * 30) for policy in (of(Oldest), streaming)
    )
    torch.testing.assert_close(found, expected)


def test_a_budget_of_everything_is_full_attention(model, ids):
    tokens, mask = ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :9] = 0
    for padding in (None, mask):
        found = read(model, of(Oldest, budget=30).new(model), tokens, padding, 11, 1, 1, 17)
        positions = None if padding is None else (padding.cumsum(1) - 1).clamp(min=0)
        expected = model(tokens, attention_mask=padding, position_ids=positions, use_cache=False).logits
        real = mask.bool() if padding is not None else ...
        torch.testing.assert_close(found[real], expected[real])


def test_what_is_kept(model, ids):
    """Of 20 tokens in chunks of 7, 7 and 6; the middle row's first nine are padding."""
    tokens, mask = ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[1, :9] = mask[2, :15] = 0
    cache = of(Oldest).new(model)
    read(model, cache, tokens, mask, 7, 7, 6)
    rows = [[0, 1, 2, 15, 16, 17, 18, 19], [0, 1, 2, 6, 7, 8, 9, 10], [-1, -1, -1, 0, 1, 2, 3, 4]]
    for store in stores(cache):
        assert store.positions.tolist() == [[row] * 2 for row in rows]
        assert torch.equal(store.scores, -store.positions.double())


def test_scores_stay_with_their_tokens(model, ids):
    cache = of(Counted, recent_size=0).new(model)
    read(model, cache, ids(1, 15), None, 6, 5, 1, 1, 2)
    for store in stores(cache):  # of the first tokens none is left, of the five that came next four are
        assert store.scores.tolist() == [[[-4] * 4 + [-3] + [-2] + [-1] * 2] * 2]


def test_memory_does_not_grow(model, ids, held):
    policy, sizes = of(Oldest), set()
    cache = policy.new(model)
    for length in (9, 30, 100, 101):
        prefill(model, ids(1, length), None, cache, 16)
        sizes.add(held(cache))
    assert sizes == {policy.num_bytes(model.config, 101, 1, model.dtype)}


def test_beams_and_resets_take_scores_along(model, ids):
    cache = of(Counted).new(model)
    read(model, cache, ids(3, 20), None, 11, 9)
    (kept, _), rows = [store.twin() for store in stores(cache)], torch.tensor([2, 0])
    cache.batch_select_indices(rows)
    for name in ("keys", "values", "positions", "scores"):
        assert torch.equal(getattr(stores(cache)[0], name), getattr(kept, name)[rows])
    cache.reset()
    assert [store.tensors() for store in stores(cache)] == [[], []]


@pytest.mark.parametrize("last", [None, 1, 4, 50])
@pytest.mark.parametrize("tile", [1, 2**26])
def test_attention_received(monkeypatch, last, tile):
    """Against a softmax for each query. The first row has lost its tokens 1 to 4, the second is padded twice."""
    monkeypatch.setattr(seen, "TILE", tile)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(shape, generator=generator).double() for shape in ((2, 4, 5, 8), (2, 2, 9, 8)))
    positions = torch.tensor([[0, 5, 6, 7, 8, 9, 10, 11, 12], [-1, -1, 0, 1, 2, 3, -1, 4, 5]])
    shown = Seen(
        queries=q, keys=k, values=k, scaling=0.5, scores=torch.zeros(2, 2, 9).double(),
        positions=positions[:, None].expand(2, 2, 9).int(),
    )  # fmt: skip
    expected = torch.zeros(2, 2, 9).double()
    for row, position in enumerate(positions.tolist()):
        for head in range(4):
            for query in [query for query in range(5) if position[4 + query] >= 0][-(last or 5) :]:
                keys = [j for j in range(9) if 0 <= position[j] <= position[4 + query]]
                weights = [math.exp(0.5 * float(q[row, head, query] @ k[row, head // 2, j])) for j in keys]
                for j, weight in zip(keys, weights, strict=True):
                    expected[row, head // 2, j] += weight / sum(weights)
    torch.testing.assert_close(shown.received(last), expected)


@pytest.mark.parametrize(
    ("mean", "beta", "num_layers"), [(1024, 20, 32), (7, 1.5, 5), (3, 100, 4), (10, 1, 3), (9, 7, 1)]
)
def test_a_pyramid(mean, beta, num_layers):
    tokens = pyramid(mean, beta, num_layers)
    first, last = (2 * mean - mean / beta, mean / beta) if num_layers > 1 else (mean, mean)
    exact = torch.linspace(first, last, num_layers, dtype=torch.float64)
    assert sum(tokens) == mean * num_layers
    assert tokens == sorted(tokens, reverse=True)
    assert (torch.tensor(tokens) - exact).abs().max() < 1


def test_each_layer_keeps_its_own_number(model, ids):
    policy = of(Oldest, pyramid_beta=3)  # of 3 more than the recent tokens on average, 5 and 1
    cache = policy.new(model, 11)
    read(model, cache, ids(1, 20), None, 20)
    assert [store.keys.shape[2] for store in stores(cache)] == [10, 6]
    with pytest.raises(InputError, match="every layer keeps 6 tokens or more, which is all of 6; use cache=full"):
        policy.new(model, 6)
    policy.new(model, 7)


def test_graphs_are_refused(model, ids):
    cache = of(Oldest).new(model)
    prefill(model, ids(1, 12), None, cache, None)
    token = before.set(torch.tensor([11]))
    try:
        with pytest.raises(InputError, match="changes as the text grows; use graphs=False"):
            model(ids(1, 1), past_key_values=cache)
    finally:
        before.reset(token)
