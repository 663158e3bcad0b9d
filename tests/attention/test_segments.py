from math import log

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import MistralConfig
from transformers.masking_utils import causal_mask_function

from lctrain.attention.base import Layout
from lctrain.errors import InputError
from lctrain.kernels.reference import ReferenceKernel
from lctrain.model.call import ForwardMask, LayerCall
from lctrain.model.install import attention_modules, equip, install
from lctrain.plan.fakes import attend_by


def pool(members, u):
    """One summary (key, value, number of tokens)."""
    keys, values, numbers = zip(*members, strict=True)
    weights = (torch.stack(keys) @ u * u.numel() ** -0.5).softmax(-1)
    return weights @ torch.stack(keys), weights @ torch.stack(values), sum(numbers)


def read_online(q, k, v, sizes, recent_size, queries, scaling):
    """One head: a list of tokens and one of summaries per level, whose oldest are closed as tokens come."""
    lists = [[] for _ in range(len(sizes) + 1)]
    for i in range(len(q)):
        lists[0].append((k[i], v[i], 1))
        for level, size in enumerate(sizes):
            num = size // (1 if level == 0 else sizes[level - 1])
            if len(lists[level]) == num + (recent_size if level == 0 else 0):
                lists[level + 1].append(pool(lists[level][:num], queries[level]))
                lists[level] = lists[level][num:]
        seen = [each for level in lists for each in level]
        assert sum(number for *_, number in seen) == i + 1
        scores = torch.stack([q[i] @ key * scaling + log(number) for key, _, number in seen])
        yield scores.softmax(-1) @ torch.stack([value for _, value, _ in seen])


def naive(segment_sizes, recent_size, pooling):
    def attend(module, q, k, v, scaling):
        num_heads, num_kv, head_dim = q.shape[1], k.shape[1], q.shape[3]
        levels = len(segment_sizes)
        learned = module.segments.queries if pooling == "attention" else q.new_zeros(levels, num_kv, head_dim)
        out = []
        for b, h in torch.cartesian_prod(*map(torch.arange, q.shape[:2])).tolist():
            kv = h // (num_heads // num_kv)
            one = read_online(q[b, h], k[b, kv], v[b, kv], segment_sizes, recent_size, learned[:, kv], scaling)
            out.append(torch.stack(list(one)))
        return torch.stack(out).view(q.shape)

    return {"attend": attend}


def case(*fields):
    named = dict(zip(("segment_sizes", "recent_size", "pooling"), fields, strict=True))
    return "segments", named, naive(**named)


CASES = {
    "segments": case([3, 6], 2, "mean"),
    "segments learned": case([2, 8], 1, "attention"),
    "segments one level": case([4], 5, "mean"),
    "segments three levels": case([2, 4, 12], 1, "attention"),
    "segments of tokens": case([1, 5], 3, "mean"),
}
FIELDS = {"segment_sizes": [1, 3], "recent_size": 5, "pooling": "attention"}  # another value of each


def call_on(num_tokens, layout):
    mask = ForwardMask(1, num_tokens, num_tokens, 0, 0, causal_mask_function, None, None)
    return LayerCall(
        layout=layout,
        kernel=ReferenceKernel(),
        mask=mask,
        module=None,
        position_ids=torch.arange(num_tokens)[None],
        ulysses=None,
        scaling=0.5,
        softcap=None,
    )


def layout_of(length, **changes):
    return Layout(length=length, num_attention_heads=4, num_key_value_heads=2, layer_idx=0, **changes)


def test_a_summary_of_equal_tokens_is_these_tokens(method_of):
    """It has their mass: segments whose tokens are all alike are full attention, whatever the sizes."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 24, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    k, v = (x[:, :, ::12].repeat_interleave(12, 2) for x in (k, v))
    call = call_on(24, layout_of(24))
    expected = call.run(method_of("full"), q, k, v)
    out = method_of("segments", segment_sizes=[3, 12], recent_size=2).attend(None, q, k, v, call)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_many_recent_tokens_are_full_attention(attending, method_of, ids):
    tokens = ids(2, 40)
    expected = attending("full")(input_ids=tokens).logits
    for sizes in ([4, 8], [64]):
        logits = attending(method_of("segments", segment_sizes=sizes, recent_size=37))(input_ids=tokens).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=5e-5)


def test_learned_pooling_begins_as_the_mean_and_learns(tiny, method_of, ids):
    logits = {}
    for pooling in ("mean", "attention"):
        model = tiny("llama")
        install(model, method_of("segments", segment_sizes=[3, 6], recent_size=2, pooling=pooling), "sdpa")
        logits[pooling] = model(input_ids=ids(1, 40)).logits
    torch.testing.assert_close(logits["attention"], logits["mean"], rtol=1e-4, atol=5e-5)
    logits["attention"].square().sum().backward()
    queries = [module.segments.queries for module in attention_modules(model)]
    assert all(q.dtype == torch.float32 and (q.grad.abs().amax(-1) > 0).all() for q in queries)


def test_the_mean_adds_no_parameters(tiny, method_of):
    model = tiny("llama")
    method = method_of("segments")
    before = [name for name, _ in model.named_parameters()]
    install(model, method, "sdpa")
    assert [name for name, _ in model.named_parameters()] == before
    assert not method.learns


@pytest.mark.parametrize("num_repeats", [1, 2])
def test_ranks_that_share_a_row_take_the_queries_of_their_heads(method_of, tiny, num_repeats):
    """Each of two ranks; where key-value heads are repeated in the exchange, also each of four."""
    model = tiny("llama")
    method = method_of("segments", segment_sizes=[3, 6], recent_size=2, pooling="attention")
    install(model, method, "sdpa")
    module = attention_modules(model)[0]
    generator = torch.Generator().manual_seed(0)
    module.segments.queries.data.normal_(generator=generator)
    q, k, v = (torch.randn(1, heads, 24, 8, generator=generator) for heads in (4, 2, 2))
    expected = method.attend(module, q, k, v, call_on(24, layout_of(24)))
    num = 2 // num_repeats
    k, v = (x.repeat_interleave(num_repeats, 1) for x in (k, v))
    parts = [
        method.attend(module, *here, call_on(24, layout_of(24, first_head=rank * num)))
        for rank, here in enumerate(zip(q.split(num, 1), k.split(1, 1), v.split(1, 1), strict=True))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_bf16_is_close_to_fp64(method_of):
    """Weights of hundreds of tokens do not drown those of single ones."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 600, 8, generator=generator).bfloat16() for heads in (4, 2, 2))
    method = method_of("segments", segment_sizes=[16, 256], recent_size=8)
    call = call_on(600, layout_of(600))
    out, exact = (
        method.attend(None, *(x.to(dtype) for x in (q, k, v)), call) for dtype in (torch.bfloat16, torch.double)
    )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=0.02)


def test_the_planner_counts_what_is_seen(method_of):
    """Tokens and summaries of each query, as the loop above lists them, and each in two calls."""
    zeros = torch.zeros(41, 1)
    counted = []
    for i in range(1, 42):
        lists = [i, 0, 0]
        while lists[0] >= 3 + 2:
            lists[0], lists[1] = lists[0] - 3, lists[1] + 1
        lists[1], lists[2] = lists[1] % 4, lists[1] // 4
        counted.append(sum(lists))
    parts = method_of("segments", segment_sizes=[3, 12], recent_size=2).parts(layout_of(len(zeros)))
    assert [(cost.keys, heads) for cost, heads in parts] == [(pytest.approx(sum(counted) / 41), 4)] * 2


@pytest.mark.parametrize("sequence_parallel_size", [1, 2])
def test_the_planner_runs_it_without_data(tiny, method_of, sequence_parallel_size):
    """Whatever depends on the contents of a tensor would fail here, and make a card wait."""
    model, method = tiny("llama"), method_of("segments", segment_sizes=[3, 6], recent_size=2, pooling="attention")
    equip(model, method)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(1, heads, 16, 8, requires_grad=True) for heads in (4, 2, 2))
        attend = attend_by(method, 16 * sequence_parallel_size, sequence_parallel_size)
        out, _ = attend(attention_modules(model)[0], q, k, v, None)
        out.sum().backward()
    assert out.shape == (1, 16, 4, 8)
    assert q.grad.shape == q.shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segment_sizes": []}, "must be positive numbers"),
        ({"segment_sizes": [0, 4]}, "must be positive numbers"),
        ({"segment_sizes": [4, 6]}, "a multiple of the one before"),
        ({"segment_sizes": [4, 4]}, "a multiple of the one before"),
        ({"recent_size": 0}, "recent_size must be positive"),
        ({"pooling": "max"}, "pooling=max must be mean or attention"),
    ],
)
def test_fields_must_be_possible(method_of, fields, message):
    with pytest.raises(InputError, match=message):
        method_of("segments", **fields)


def test_a_model_with_its_own_window_is_refused(method_of):
    with pytest.raises(InputError, match="SegmentAttention needs a model without a window of its own"):
        method_of("segments").check(MistralConfig(sliding_window=5), [8])
