from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from lctrain.attention.base import Layout
from lctrain.attention.duo import GATES
from lctrain.errors import InputError
from lctrain.model.install import attention_modules, install


def gate(module, h):
    return module.duo.head_gates[h // 2]


CASES = {
    "duo": (
        "duo",
        {"num_sink_tokens": 2, "recent_size": 4, "initial_gate": 0.75},
        [
            (gate, lambda layer, h, q, k, n: k <= q),
            (lambda module, h: 1 - gate(module, h), lambda layer, h, q, k, n: k <= q and (k < 2 or q - k < 4)),
        ],
    )
}
FIELDS = {"num_sink_tokens": 4, "recent_size": 9, "initial_gate": 0.5}  # another value of each; clamp: see below


def small(method_of, **fields):
    return method_of("duo", num_sink_tokens=2, recent_size=4, **fields)


@pytest.mark.parametrize(("gate", "name"), [(1.0, "full"), (0.0, "streaming")])
def test_an_open_gate_is_full_attention_and_a_closed_one_streams_to_the_bit(
    attending, tiny, method_of, ids, gate, name
):
    model, tokens = tiny("llama"), ids(2, 40)
    install(model, small(method_of, initial_gate=gate), "sdpa")
    assert torch.equal(model(input_ids=tokens).logits, attending(name)(input_ids=tokens).logits)


def test_every_layer_has_a_gate_per_key_value_head_in_fp32(tiny, method_of):
    for model in (tiny("llama").bfloat16(), tiny("qwen3").bfloat16(), tiny("llama").to("meta")):
        install(model, small(method_of), "reference")
        gates = [module.get_parameter(GATES) for module in attention_modules(model)]
        assert [(g.shape, g.dtype, g.device) for g in gates] == [((2,), torch.float32, model.device)] * 2


@pytest.mark.parametrize("name", ["full", "streaming"])
def test_a_gate_at_its_bound_still_has_a_gradient(attending, ids, name):
    """The gate's gradient is that of the difference of both branches, whichever is open."""
    model = attending("duo")
    gates = [module.get_parameter(GATES) for module in attention_modules(model)]
    for g in gates:
        g.data.fill_(float(name == "full"))
    model(input_ids=ids(1, 40)).logits.square().sum().backward()
    assert all((g.grad != 0).all() for g in gates)


def test_gates_keep_their_gradient_beside_bf16(tiny, method_of):
    """A sum over all tokens for each branch: rounded to 8 bits, the difference of the two would be lost."""
    model, method = tiny("llama"), small(method_of)
    install(model, method, "sdpa")
    module = attention_modules(model)[0]
    streaming = 3 + torch.randn(1, 4, 4096, 8, generator=torch.Generator().manual_seed(0))
    branches = {method.full: (streaming + 0.25).bfloat16(), method.streaming: streaming.bfloat16()}
    layout = Layout(length=4096, num_attention_heads=4, num_key_value_heads=2, layer_idx=0)
    q = streaming.bfloat16()
    call = SimpleNamespace(layout=layout, run=lambda pattern, *_: branches[pattern])
    out = method.attend(module, q, q[:, :2], q[:, :2], call)
    out.sum().backward()
    exact = branches[method.full].double() - branches[method.streaming].double()
    expected = exact.sum((0, 2, 3)).view(2, 2).sum(1).float()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(module.get_parameter(GATES).grad, expected, rtol=1e-4, atol=0)


def test_ranks_that_share_a_row_take_the_gates_of_their_heads(method_of, tiny):
    model, method = tiny("llama", num_attention_heads=8, num_key_value_heads=4), small(method_of)
    install(model, method, "sdpa")
    module = attention_modules(model)[0]
    module.get_parameter(GATES).data = torch.tensor([0.0, 0.25, 0.5, 1.0])
    q, k = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    layout = Layout(length=5, num_attention_heads=8, num_key_value_heads=4, layer_idx=0, first_head=4)
    ran = {True: torch.ones(1, 4, 5, 8), False: torch.zeros(1, 4, 5, 8)}
    call = SimpleNamespace(layout=layout, run=lambda pattern, *_: ran[pattern == method.full])
    out = method.attend(module, q, k, k, call)
    assert out[0, :, 0, 0].tolist() == [0.5, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("fields", [{"recent_size": 0}, {"num_sink_tokens": -1}, {"initial_gate": 1.5}])
def test_sizes_and_gates_must_be_possible(method_of, fields):
    with pytest.raises(InputError, match=f"{next(iter(fields))}"):
        method_of("duo", **fields)


def test_streaming_heads_that_see_everything_are_refused(method_of):
    method = method_of("duo", num_sink_tokens=4, recent_size=13)
    method.check(LlamaConfig(), [8, 18])
    with pytest.raises(InputError, match=r"= 17 is all of the longest sequence \(17\)"):
        method.check(LlamaConfig(), [8, 17])
