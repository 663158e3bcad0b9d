"""Saved to disk, loaded by the recipe: every family's own attention, and another in its place."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lctrain.attention.shifted_sparse import ShiftedSparseAttention
from lctrain.attention.sliding_window import SlidingWindowAttention
from lctrain.attention.streaming import StreamingAttention
from lctrain.model.head import check_head, hidden_states, token_losses

ALTERNATING = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 9,
            "layer_types": ALTERNATING,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": ("gemma3_text", {"sliding_window": 9, "layer_types": ALTERNATING}),
    "phi3": ("phi3", {"sliding_window": None}),
    "olmo2": ("olmo2", {}),
}  # the first layer of those that alternate sees 9 tokens


@pytest.fixture(params=FAMILIES)
def family(request, saved, recipe):
    """(plain transformers' model, makes the recipe's)."""
    model_type, shape = FAMILIES[request.param]
    plain = AutoModelForCausalLM.from_pretrained(saved(model_type, **shape), attn_implementation="eager").eval()
    return plain, lambda **changes: recipe(model_type, shape=shape, **changes).build().eval()


def packed(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_full_attention_is_the_model_as_published(family, ids, kernel):
    plain, build = family
    model, tokens = build(kernel=kernel), ids(2, 40)
    close(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    a, b = (m(input_ids=tokens, attention_mask=mask, position_ids=positions).logits for m in (model, plain))
    close(a[0, 7:], b[0, 7:])
    close(a[1], b[1])
    a, b = (m(input_ids=tokens[:1], position_ids=packed(11, 29), use_cache=False).logits for m in (model, plain))
    close(a, b)


def test_generation_is_the_models_own(family, ids):
    plain, build = family
    tokens = ids(2, 14)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "use_cache": True}
    a, b = (m.generate(input_ids=tokens, attention_mask=mask, **settings) for m in (plain, build()))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("method", "reach"),
    [
        (SlidingWindowAttention(sliding_window=5), 5),
        (StreamingAttention(num_sink_tokens=0, recent_size=5), 5),
        (ShiftedSparseAttention(group_size_ratio=None, group_size=8), 4),  # the first shifted group ends after 4 tokens
    ],
    ids=["window", "streaming", "s2"],
)
def test_another_method_differs_only_where_it_hides_something(family, ids, method, reach):
    plain, build = family
    tokens = ids(1, 40)
    expected, logits = plain(input_ids=tokens).logits, build(attention=method)(input_ids=tokens).logits
    close(logits[:, :reach], expected[:, :reach])
    assert ((logits - expected).abs().amax(-1) > 1e-3)[0, reach + 5 :].all()


def test_one_step_of_another_method_trains(family, ids):
    _, build = family
    model, tokens = build(attention=SlidingWindowAttention(sliding_window=5)), ids(1, 40)
    labels = tokens.roll(-1)
    check_head(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss, _ = token_losses(model, hidden_states(model, tokens, packed(15, 25)), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not missing
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_token_losses_are_those_of_the_models_logits(tiny, ids, softcap):
    model, tokens = tiny("gemma2", final_logit_softcapping=softcap), ids(2, 20)
    labels = tokens.roll(-1)
    labels[0, 5:9] = -100
    logits = model(input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    total, losses = token_losses(model, hidden_states(model, tokens, packed(20)), labels)
    close(losses, expected[labels.flatten() != -100])
    close(total, expected.sum())


@pytest.mark.parametrize("width", [5, 20, [20, 5]])
def test_a_window_replaces_the_models_own(recipe, ids, width):
    """Also where it is wider: a Mistral of window 9 then sees what one without a window sees under this one."""
    method, tokens = SlidingWindowAttention(sliding_window=width), ids(1, 40)
    own = recipe("mistral", shape={"sliding_window": 9}, attention=method).build().eval()
    none = recipe("mistral", shape={"sliding_window": None}, attention=method).build().eval()
    close(own(input_ids=tokens).logits, none(input_ids=tokens).logits)


def test_the_window_is_exported_for_plain_transformers(recipe, saved, ids, tmp_path):
    model = (
        recipe("mistral", shape={"sliding_window": 9}, attention=SlidingWindowAttention(sliding_window=20))
        .build()
        .eval()
    )
    model.save_pretrained(tmp_path)
    plain, tokens = AutoModelForCausalLM.from_pretrained(tmp_path), ids(1, 40)
    assert plain.config.sliding_window == 20
    close(plain(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_alternating_windows_and_a_cap_shape_the_logits(saved, tiny, ids):
    """That the families above have what they are tested for."""
    tokens = ids(1, 40)
    _, shape = FAMILIES["gemma2"]
    logits = [tiny("gemma2", **shape | change)(input_ids=tokens).logits for change in (
        {}, {"sliding_window": 40}, {"attn_logit_softcapping": None}, {"final_logit_softcapping": None}
    )]  # fmt: skip
    assert all((logits[0] - other).abs().max() > 1e-2 for other in logits[1:])
