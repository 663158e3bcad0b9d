from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import MistralConfig

from lctrain.attention.base import Layout, Rows
from lctrain.attention.moba import MoBA
from lctrain.errors import InputError
from lctrain.model.install import attention_modules, equip
from lctrain.plan.fakes import attend_by


def seen_by(q, keys, i, block_size, top_k):
    """The keys that query i of one head sees: its own block up to itself, and the best of those before."""
    earlier = range(i // block_size)
    scores = {n: float((q @ keys[n * block_size : (n + 1) * block_size].mean(0)).detach()) for n in earlier}
    best = sorted(earlier, key=scores.__getitem__, reverse=True)[: top_k - 1]
    return [j for j in range(i + 1) if j // block_size in [*best, i // block_size]]


def naive(block_size, top_k):
    def attend(module, q, k, v, scaling):
        out = torch.zeros_like(q)
        for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
            keys, values = (x[b, h // (q.shape[1] // k.shape[1])] for x in (k, v))
            seen = seen_by(q[b, h, i], keys, i, block_size, top_k)
            out[b, h, i] = (keys[seen] @ q[b, h, i] * scaling).softmax(-1) @ values[seen]
        return out

    return {"attend": attend}


CASES = {
    "moba": ("moba", {"block_size": 4, "top_k": 3}, naive(4, 3)),
    "moba tokens": ("moba", {"block_size": 1, "top_k": 4}, naive(1, 4)),
    "moba own": ("moba", {"block_size": 5, "top_k": 1}, naive(5, 1)),
    "moba small": ("moba", {"block_size": 3, "top_k": 2}, naive(3, 2)),
}
FIELDS = {"block_size": 4, "top_k": 3}  # another value of each


@pytest.mark.parametrize("fields", [{"block_size": 4, "top_k": 10}, {"block_size": 64, "top_k": 1}])
def test_all_blocks_are_full_attention(attending, method_of, ids, fields):
    tokens = ids(2, 40)
    expected = attending("full")(input_ids=tokens).logits
    logits = attending(method_of("moba", **fields))(input_ids=tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=5e-5)


def test_heads_that_share_keys_choose_for_themselves():
    q = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])  # two heads, one query each
    keys = torch.tensor([[[[3.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [0.0, 2.0]]]])  # two blocks of two keys
    assert MoBA(block_size=2, top_k=2).score(q, keys)[0, :, 0].tolist() == [[2.0, 0.0], [0.0, 2.0]]


def test_the_choice_is_made_in_fp32():
    """The scores differ by less than a bf16 tells apart."""
    method, q = MoBA(block_size=1, top_k=2), torch.ones(1, 1, 4, 2).bfloat16()
    keys = torch.tensor([[1.0, 0.001], [1.0, 0.0015], [1.0, 0.002], [0.0, 0.0]])[None, None].bfloat16()
    tables = {"positions_BS": torch.arange(4)[None], "documents_BS": torch.zeros(1, 4, dtype=torch.int64)}
    call = SimpleNamespace(
        rows=Rows(**tables, first_query=0, num_queries=4, shared={}),
        over=lambda visible, *_: visible(torch.tensor(0), torch.tensor(0), torch.tensor(3), torch.arange(4)),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = method.attend(None, q, keys, keys, call)
    assert seen.tolist() == [False, False, True, True]


def test_the_planner_counts_the_keys_that_are_seen():
    generator = torch.Generator().manual_seed(0)
    q, keys = (torch.randn(23, 8, generator=generator) for _ in range(2))
    counts = [len(seen_by(q[i], keys, i, 4, 3)) + (i // 4) / 2 for i in range(23)]
    layout = Layout(length=23, num_attention_heads=4, num_key_value_heads=2, layer_idx=0)
    [(cost, heads)] = MoBA(block_size=4, top_k=3).parts(layout)
    assert (cost.keys, heads) == (pytest.approx(sum(counts) / 23), 4)


@pytest.mark.parametrize("sequence_parallel_size", [1, 2])
def test_the_planner_runs_it_without_data(tiny, method_of, sequence_parallel_size):
    """Whatever depends on the contents of a tensor would fail here, and make a card wait."""
    model, method = tiny("llama"), method_of("moba", block_size=4)
    equip(model, method)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(1, heads, 16, 8, requires_grad=True) for heads in (4, 2, 2))
        attend = attend_by(method, 16 * sequence_parallel_size, sequence_parallel_size)
        out, _ = attend(attention_modules(model)[0], q, k, v, None)
        out.sum().backward()
    assert out.shape == (1, 16, 4, 8)
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("field", ["block_size", "top_k"])
def test_sizes_must_be_positive(method_of, field):
    with pytest.raises(InputError, match=f"MoBA: {field} must be positive, got 0"):
        method_of("moba", **{field: 0})


def test_a_model_with_its_own_window_is_refused(method_of):
    with pytest.raises(InputError, match="MoBA needs a model without a window of its own"):
        method_of("moba").check(MistralConfig(sliding_window=5), [8])
