import pytest
import torch
from transformers import LlamaConfig

from lctrain.attention.base import Layout
from lctrain.errors import InputError
from lctrain.kernels.mask import Local

SMALL = {"segment_size": 6, "memory_size": 4}
FIELDS = {"segment_size": 9, "memory_size": 7, "detach": False}  # another value of each


def segment_by_segment(module, q, k, v, scaling):
    """The recurrence as the paper runs it: a memory is carried from segment to segment, and gradients stop there."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    memory_k, memory_v, out = k[:, :, :0], v[:, :, :0], []
    for own_q, own_k, own_v in zip(*(x.split(6, dim=2) for x in (q, k, v)), strict=True):
        keys, values = torch.cat((memory_k, own_k), dim=2), torch.cat((memory_v, own_v), dim=2)
        for i in range(own_q.shape[2]):
            seen = memory_k.shape[2] + i + 1
            scores = torch.einsum("bhd,bhsd->bhs", own_q[:, :, i], keys[:, :, :seen]) * scaling
            out.append(torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), values[:, :, :seen]))
        memory_k, memory_v = keys[:, :, -4:].detach(), values[:, :, -4:].detach()
    return torch.stack(out, dim=2)


CASES = {
    "transformer_xl live": (
        "transformer_xl",
        {**SMALL, "detach": False},
        lambda layer, h, q, k, n: k <= q and (k // 6 == q // 6 or k in range(q // 6 * 6 - 4, q // 6 * 6)),
    ),
    "transformer_xl": ("transformer_xl", SMALL, {"attend": segment_by_segment}),
}


def test_the_memory_hides_its_gradient_and_not_its_values(attending, ids):
    logits, gradients = [], []
    for name in ("transformer_xl", "transformer_xl live"):
        model = attending(name)
        logits.append(model(input_ids=ids(1, 40)).logits)
        logits[-1].square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=5e-5)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3 * gradients[1].abs().max()


def test_no_gradient_reaches_an_earlier_segment_by_way_of_its_keys_and_values(attending, ids):
    """Not even through several layers, although each layer makes a token reach further back."""
    model, tokens = attending("transformer_xl", num_hidden_layers=3), ids(1, 24)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embedded).logits[0, 20].square().sum().backward()
    assert embedded.grad[0].abs().sum(-1).nonzero()[:, 0].tolist() == [18, 19, 20]
    changed = tokens.clone()
    changed[0, 9] = (tokens[0, 9] + 7) % 64  # seen by 14 to 17, which 20 sees
    before, after = (model(input_ids=t).logits[0, 20] for t in (tokens, changed))
    assert not torch.equal(before, after)


def test_nothing_is_copied_where_no_gradients_are_computed(attending, ids):
    with torch.no_grad():
        live, detached = (
            attending(name)(input_ids=ids(1, 40)).logits for name in ("transformer_xl live", "transformer_xl")
        )
    assert torch.equal(live, detached)


def test_without_a_memory_segments_stand_alone(method_of):
    layout = Layout(length=40, num_attention_heads=4, num_key_value_heads=2, layer_idx=0)
    method = method_of("transformer_xl", memory_size=0)
    assert method.local(layout, 0) == Local(group=6)
    query, key = torch.arange(40)[:, None], torch.arange(40)
    seen = method.visible(layout)(0, 0, query, key) & (key <= query)
    assert torch.equal(seen, (query // 6 == key // 6) & (key <= query))


@pytest.mark.parametrize("fields", [{"segment_size": 0}, {"memory_size": -1}])
def test_sizes_that_mean_nothing_are_refused(method_of, fields):
    with pytest.raises(InputError, match=f"{next(iter(fields))} must"):
        method_of("transformer_xl", **fields)


def test_one_segment_is_refused(method_of):
    method_of("transformer_xl").check(LlamaConfig(), [7])
    with pytest.raises(InputError, match=r"segment_size=6 is all of the longest sequence \(6\)"):
        method_of("transformer_xl").check(LlamaConfig(), [6])
