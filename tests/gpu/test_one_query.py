"""On a card: one token against many keys, by the kernel and by torch's own operations."""

from itertools import product

import pytest
import torch

from lctrain.kernels.one_query import Buffer, attend_one, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = {  # rows, key-value heads, query heads of each, head dimension, slots, sinks, heads that are kept
    "all keys": (1, 8, 4, 128, 20_000, 19_999, None),
    "few keys": (2, 2, 4, 64, 130, 129, None),
    "half of the heads": (2, 8, 4, 128, 5_000, 4_999, [0, 3, 4, 7]),
    "one head": (1, 8, 8, 128, 70_000, 69_999, [5]),
    "a ring": (1, 8, 4, 128, 320, 64, [1, 2, 5, 6]),
    "a large ring": (1, 4, 1, 96, 3_000, 10, [0, 2, 3]),
    "many queries": (1, 2, 32, 256, 3_000, 2_999, None),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(shape, dtype, tolerance):
    rows, num_heads, group, dim, slots, sinks, heads = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(0)
    kept = None if heads is None else torch.tensor(heads, device="cuda")

    def random(*sizes):
        return torch.randn(sizes, device="cuda", generator=generator).to(dtype)

    keys, values = (random(rows, num_heads if heads is None else len(heads), slots, dim) for _ in range(2))
    own = Buffer(keys.clone(), values.clone(), sinks, kept)
    exact = Buffer(keys.float(), values.float(), sinks, kept)
    turns = slots - sinks
    more = [slots, slots + turns // 2, 7 * slots] if turns > 1 else []
    for position in (0, 1, 63, 64, sinks - 1, sinks, slots - 1, *more):
        q, k, v = (random(rows, 1, n * num_heads, dim).transpose(1, 2) for n in (group, 1, 1))
        before, untouched = torch.tensor([position], device="cuda"), random(*q.shape)
        found, expected = untouched.clone(), untouched.float()
        attend_one(q, k, v, own, before, found, dim**-0.5)
        reference(q.float(), k.float(), v.float(), exact, before, expected, dim**-0.5)
        assert torch.linalg.norm(found - expected) < tolerance * torch.linalg.norm(expected), position
        others = sorted({*range(num_heads)} - {*(range(num_heads) if heads is None else heads)})
        parts = [x.unflatten(1, (num_heads, group))[:, others] for x in (found, untouched)]
        assert torch.equal(*parts)
        assert all(torch.equal(a.float(), b) for a, b in zip(own[:2], exact[:2], strict=True))


def test_a_graph_serves_every_token():
    """How many tokens came before is read when a graph is replayed."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 64, device="cuda", generator=generator) for n in (8, 2, 2))
    buffer = Buffer(*(torch.randn(1, 2, 3000, 64, device="cuda", generator=generator) for _ in range(2)), 2999)
    before, out, expected = torch.tensor([5], device="cuda"), torch.empty_like(q), torch.empty_like(q)
    attend_one(q, k, v, buffer, before, out, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend_one(q, k, v, buffer, before, out, 0.1)
    for position, _ in product((7, 100, 2500), range(2)):
        before.fill_(position)
        graph.replay()
        reference(q, k, v, buffer, before, expected, 0.1)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
