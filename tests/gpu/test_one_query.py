"""On a card: one token against many keys, by the kernel and by torch's own operations."""

from itertools import product

import pytest
import torch

from lctrain.decode.one_query import Buffer, attend_one, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ALL = None
SHAPES = {  # rows, key-value heads, query heads of each, head dimension; slots, sinks and heads of every buffer
    "all keys": (1, 8, 4, 128, [(20_000, 19_999, ALL)]),
    "few keys": (2, 2, 4, 64, [(130, 129, ALL)]),
    "half of the heads": (2, 8, 4, 128, [(5_000, 4_999, [0, 3, 4, 7])]),
    "one head": (1, 8, 8, 128, [(70_000, 69_999, [5])]),
    "a ring": (1, 8, 4, 128, [(320, 64, [1, 2, 5, 6])]),
    "all keys and a ring": (1, 8, 4, 128, [(70_000, 69_999, [0, 2, 7]), (320, 64, [1, 3, 4, 5, 6])]),
    "a ring and all keys": (2, 8, 4, 128, [(320, 64, [1, 3, 4, 5, 6]), (9_000, 8_999, [0, 2, 7])]),
    "large rings": (1, 4, 1, 96, [(3_000, 10, [0, 2]), (2_000, 4, [1, 3])]),
    "many queries": (1, 2, 32, 256, [(3_000, 2_999, ALL)]),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(shape, dtype, tolerance):
    rows, num_heads, group, dim, kept = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*sizes):
        return torch.randn(sizes, device="cuda", generator=generator).to(dtype)

    own, exact, meant = [], [], set()
    for slots, sinks, chosen in kept:
        heads = range(num_heads) if chosen is ALL else chosen
        keys, values = (random(rows, len(heads), slots, dim) for _ in range(2))
        index = None if chosen is ALL else torch.tensor(chosen, device="cuda")
        own.append(Buffer(keys.clone(), values.clone(), sinks, index))
        exact.append(Buffer(keys.float(), values.float(), sinks, index))
        meant |= set(heads)
    others = sorted(set(range(num_heads)) - meant)
    end = min((slots for slots, sinks, _ in kept if slots - sinks == 1), default=40_000)
    for position in (p for p in (0, 1, 63, 64, 65, 129, 319, 320, 1_000, 2_999, 3_000, end - 1) if p < end):
        q, k, v = (random(rows, 1, n * num_heads, dim).transpose(1, 2) for n in (group, 1, 1))
        before, untouched = torch.tensor([position], device="cuda"), random(*q.shape)
        found, expected = untouched.clone(), untouched.float()
        attend_one(q, k, v, own, before, found, dim**-0.5)
        reference(q.float(), k.float(), v.float(), exact, before, expected, dim**-0.5)
        assert torch.linalg.norm(found - expected) < tolerance * torch.linalg.norm(expected), position
        parts = [x.unflatten(1, (num_heads, group))[:, others] for x in (found, untouched)]
        assert torch.equal(*parts)
        for a, b in zip(own, exact, strict=True):
            assert torch.equal(a.keys.float(), b.keys)
            assert torch.equal(a.values.float(), b.values)


def test_a_graph_serves_every_token():
    """How many tokens came before is read when a graph is replayed."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 64, device="cuda", generator=generator) for n in (8, 2, 2))
    buffer = Buffer(*(torch.randn(1, 2, 3000, 64, device="cuda", generator=generator) for _ in range(2)), 2999)
    before, out, expected = torch.tensor([5], device="cuda"), torch.empty_like(q), torch.empty_like(q)
    attend_one(q, k, v, [buffer], before, out, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend_one(q, k, v, [buffer], before, out, 0.1)
    for position, _ in product((7, 100, 2500), range(2)):
        before.fill_(position)
        graph.replay()
        reference(q, k, v, [buffer], before, expected, 0.1)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
