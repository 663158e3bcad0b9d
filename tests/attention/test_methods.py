"""What holds for every method, seen through a whole model."""

import itertools
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, StaticCache
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from lctrain.attention.base import Layout, MaskedAttention
from lctrain.config import conf_dir
from lctrain.errors import InputError
from lctrain.kernels.interval import Blocks
from lctrain.kernels.mask import Mask
from lctrain.model.install import equip, install

BESIDE = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
CASES, FIXED, set_learned = BESIDE["CASES"], BESIDE["FIXED"], BESIDE["set_learned"]
close = partial(torch.testing.assert_close, rtol=1e-4, atol=5e-5)
METHODS = list(CASES)


def naive_attention(parts):
    """One softmax per query and part, over the keys that the part's pattern lists; a weighted sum of the parts."""

    def attend(module, q, k, v, mask, scaling, **_):
        out = torch.zeros_like(q)
        for weight, pattern in parts:
            for h in range(q.shape[1]):
                kv_head = h // (q.shape[1] // k.shape[1])
                for i in range(q.shape[2]):
                    seen = [j for j in range(k.shape[2]) if pattern(module.layer_idx, h, i, j, k.shape[2])]
                    scores = torch.einsum("bd,bsd->bs", q[:, h, i], k[:, kv_head, seen]) * scaling
                    attended = torch.einsum("bs,bsd->bd", scores.softmax(-1), v[:, kv_head, seen])
                    out[:, h, i] = out[:, h, i] + weight(module, h) * attended
        return out.transpose(1, 2), None

    return attend


def own_attention(attend):
    """What a method declares of itself."""
    return lambda module, q, k, v, mask, scaling, **_: (attend(module, q, k, v, scaling).transpose(1, 2), None)


def naive(model, name, method):
    """The model in fp64 with the loop above, and what the method learned."""
    case = CASES[name][2]
    AttentionInterface.register(
        "naive",
        own_attention(case["attend"])
        if isinstance(case, dict)
        else naive_attention(case if isinstance(case, list) else [(lambda *_: 1, case)]),
    )
    AttentionMaskInterface.register("naive", lambda **_: None)
    model.set_attn_implementation("naive")
    equip(model, method)
    set_learned(model, method)
    return model.double()


def test_the_methods_here_are_those_of_conf(method_of):
    tested = {type(method_of(name)) for name in METHODS}
    assert {type(method_of(path.stem)) for path in (conf_dir() / "attention").glob("*.yaml")} == tested


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize("name", METHODS)
def test_logits_and_gradients_equal_a_naive_loop_in_fp64(attending, tiny, ids, method_of, name, kernel):
    model, expected = attending(name, kernel), naive(tiny("llama"), name, method_of(name))
    tokens = ids(2, 24)
    upstream = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(1))
    for m in (model, expected):
        m.logits = m(input_ids=tokens).logits
        (m.logits * upstream).sum().backward()
    close(model.logits.double(), expected.logits)
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        scale = b.grad.abs().max()
        close(a.grad / scale, b.grad / scale, rtol=0, atol=1e-5, check_dtype=False, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("num_key_value_heads", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_causal_to_the_bit(attending, ids, name, num_key_value_heads):
    model, tokens = attending(name, num_key_value_heads=num_key_value_heads), ids(1, 40)
    for j in (1, 8, 21, 39):
        changed = tokens.clone()
        changed[0, j] = (tokens[0, j] + 7) % 64
        before, after = (model(input_ids=t).logits[0] for t in (tokens, changed))
        assert torch.equal(before[:j], after[:j])
        assert not torch.equal(before[j:], after[j:])


def layout_of(layer=0, length=40):
    return Layout(length=length, num_attention_heads=4, num_key_value_heads=2, layer_idx=layer)


def patterns(method):
    """Those of all layers of which the method is made."""
    parts = [(part, layer) for layer in (0, 1) for part, _ in method.parts(layout_of(layer))]
    return [(part, layer) for part, layer in parts if isinstance(part, MaskedAttention)]


@pytest.mark.parametrize("documents", [[40], [17, 1, 22]], ids=["alone", "packed"])
@pytest.mark.parametrize("name", METHODS)
def test_bounds_over_blocks_hold_for_every_pair(method_of, name, documents):
    """Kernels skip blocks that are not possibly visible, and don't ask for pairs of those that surely are."""
    for pattern, layer in patterns(method_of(name)):
        check_bounds(pattern, layout_of(layer), documents)


def check_bounds(pattern, layout, documents):
    position = torch.cat([torch.arange(n) for n in documents])[None].int()
    number = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents))[None].int()
    mask = Mask(
        q_length=40, kv_length=40, num_heads=4, num_key_value_groups=2, head_dim=8, device=position.device,
        dtype=torch.float32, allowed=causal_mask_function, visible=pattern.visible(layout),
        positions=(position, position), documents=(number, number),
    )  # fmt: skip
    pairs = mask.evaluate(slice(0, 40), slice(0, 40)).unflatten(-1, (-1, 4)).unflatten(-3, (-1, 8)).transpose(-2, -3)
    q, kv = (Blocks(torch.arange(40 // size), size=size, length=40, axis=axis) for size, axis in ((8, -2), (4, -1)))
    try:
        surely, possibly = mask.bound(q, kv)
    except (TypeError, AttributeError, IndexError):
        pytest.skip("the pattern is more than arithmetic: it is evaluated pair by pair")
    assert not (surely & ~pairs.all(-1).all(-1)).any()
    assert not (pairs.any(-1).any(-1) & ~possibly).any()
    assert not (pairs.any(-1).any(-1) & ~mask.bound_parts(q, kv)).any()
    assert not possibly.all()


@pytest.mark.parametrize("name", METHODS)
def test_what_kernels_are_told_of_a_head_is_the_pattern(method_of, name):
    i = torch.arange(40)
    for (pattern, layer), head in itertools.product(patterns(method_of(name)), range(4)):
        if (local := pattern.local(layout_of(layer), head)) is not None:
            visible = pattern.visible(layout_of(layer))(torch.tensor(0), torch.tensor(head), i[:, None], i)
            near = (i[:, None] - i < (local.window or 40)) | (i < local.num_sinks)
            group = (i + local.shift) // (local.group or 40 + local.shift)
            causal = i <= i[:, None]
            assert torch.equal((visible & causal).expand(40, 40), near & (group[:, None] == group) & causal)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sliding_window", {"sliding_window": 40}),
        ("sliding_window", {"sliding_window": [41, 100]}),
        ("streaming", {"num_sink_tokens": 10, "recent_size": 30}),
        ("streaming", {"num_sink_tokens": 0, "recent_size": 40}),
        ("shifted_sparse", {"group_size_ratio": 1.0}),
    ],
)
def test_degenerate_is_full_attention(attending, method_of, ids, name, fields):
    tokens = ids(2, 40)
    full = attending("full")(input_ids=tokens).logits
    close(attending(method_of(name, **fields))(input_ids=tokens).logits, full)


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize("name", FIXED)
def test_packed_documents_are_each_document_alone(attending, ids, name, kernel):
    model, tokens = attending(name, kernel), ids(2, 39)
    rows = [[13, 6, 20], [1, 30, 8]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    packed = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    for r, row in enumerate(rows):
        for document, logits in zip(tokens[r].split(row), packed[r].split(row), strict=True):
            close(logits, model(input_ids=document[None]).logits[0])


def test_packed_documents_never_see_each_other(attending, ids):
    """A ratio of the row makes groups that a lone document has not, but documents stay apart."""
    model, tokens = attending("s2 ratio"), ids(1, 40)
    positions = torch.cat([torch.arange(13), torch.arange(27)])[None]
    changed = tokens.clone()
    changed[0, 12] = 3 if tokens[0, 12] != 3 else 4
    before, after = (model(input_ids=t, position_ids=positions, use_cache=False).logits[0] for t in (tokens, changed))
    assert torch.equal(before[13:], after[13:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FIXED)
def test_batch_of_two_is_two_of_one(attending, ids, name, side):
    model, tokens = attending(name), ids(2, 24)
    mask = torch.ones_like(tokens)
    real = slice(11, 24) if side == "left" else slice(0, 13)
    mask[0, : 11 if side == "left" else 24] = 0
    mask[0, real] = 1
    logits = model(input_ids=tokens, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    assert logits.isfinite().all()
    close(logits[0, real], model(input_ids=tokens[:1, real]).logits[0])
    close(logits[1:], model(input_ids=tokens[1:]).logits)


def decode(model, tokens, chunks, cache=None, mask=None):
    """Logits of a prompt that goes through the KV cache in chunks."""
    logits, start = [], 0
    for size in chunks:
        stop = start + size
        extra = (
            {} if mask is None else {"attention_mask": mask[:, :stop], "position_ids": positions(mask)[:, start:stop]}
        )
        out = model(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True, **extra)
        cache, start = out.past_key_values, stop
        logits.append(out.logits)
    return torch.cat(logits, 1)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("chunks", [[7] + [1] * 21, [7, 5, 1, 9, 6], [1] * 28], ids=["prompt", "chunks", "singly"])
@pytest.mark.parametrize("name", FIXED)
def test_decode_is_prefill(attending, ids, name, chunks):
    model, tokens = attending(name), ids(2, 28)
    expected = model(input_ids=tokens, use_cache=False).logits
    close(decode(model, tokens, chunks), expected)


@pytest.mark.parametrize("name", FIXED)
def test_decode_with_a_preallocated_cache_is_prefill(attending, ids, name):
    model, tokens = attending(name), ids(1, 28)
    cache = StaticCache(config=model.config, max_cache_len=33)
    expected = model(input_ids=tokens, use_cache=False).logits
    close(decode(model, tokens, [7, 5] + [1] * 16, cache), expected)


@pytest.mark.parametrize("name", FIXED)
def test_decode_of_a_padded_batch_is_each_row_alone(attending, ids, name):
    model, tokens = attending(name), ids(2, 28)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    logits = decode(model, tokens, [9] + [1] * 19, mask=mask)
    close(logits[0, 5:], model(input_ids=tokens[:1, 5:]).logits[0])
    close(logits[1:], model(input_ids=tokens[1:]).logits)


@pytest.mark.parametrize("name", ["full", "streaming", "s2 size"])
def test_decode_through_a_cache_that_drops_keys(tiny, method_of, ids, name):
    """A model's own window makes transformers keep only that many keys; positions go on counting."""
    model, tokens = tiny("mistral", sliding_window=10), ids(2, 28)
    install(model, method_of(name), "sdpa")
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    logits = decode(model, tokens, [9] + [1] * 19, mask=mask)
    close(logits[0, 5:], model(input_ids=tokens[:1, 5:], use_cache=False).logits[0])
    close(logits[1:], model(input_ids=tokens[1:], use_cache=False).logits)


def test_a_ratio_is_refused_while_decoding(attending, ids):
    with pytest.raises(InputError, match=r"group_size_ratio has no meaning while decoding; set attention.group_size"):
        decode(attending("s2 ratio"), ids(1, 9), [8, 1])


def test_gradient_checkpointing_changes_nothing(attending, ids):
    gradients = []
    for checkpointing in (False, True):
        model = attending("streaming").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids(2, 24), use_cache=False).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
