from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig

from lctrain.attention.base import Layout, Rows
from lctrain.attention.full import FullAttention
from lctrain.checkpoint import read_values
from lctrain.errors import InputError
from lctrain.kernels import linear_attention
from lctrain.kernels.linear_attention import Entries, chunked, recurrent
from lctrain.model.install import attention_modules, install
from lctrain.model.learned import fill, take
from lctrain.training.distillation import Distillation

SMALL = {
    "full_attention_interval": None, "sliding_window": 3, "feature_dim": 6, "initial_half_life": 20.0, "chunk_size": 5,
}  # fmt: skip
FIELDS = {  # another value of each
    "layers": [0], "full_attention_interval": 2, "sliding_window": 4, "feature_dim": 5, "initial_half_life": 9.0,
    "chunk_size": 7,
}  # fmt: skip


def features(x, weight):
    return torch.cat(((x @ weight).softmax(-1), (-x @ weight).softmax(-1)), -1)


def token_by_token(module, q, k, v, scaling):
    """The docstring's equation, for each query head over all pairs of tokens."""
    learned, out, groups = module.linear, torch.zeros_like(q), q.shape[1] // k.shape[1]
    for h in range(q.shape[1]):
        keys, values, kv = k[:, h // groups], v[:, h // groups], h // groups
        phi_q, phi_k = features(q[:, h], learned.feature_map_q[h]), features(keys, learned.feature_map_k[kv])
        alpha = (values @ learned.gate_weight[kv] + learned.gate_bias[kv]).sigmoid()
        for i in range(q.shape[2]):
            near = slice(max(0, i - 2), i + 1)
            scores = torch.einsum("bd,bjd->bj", q[:, h, i], keys[:, near]) * scaling
            weights = [learned.window_factors[h].sigmoid() * (scores - scores.amax(-1, keepdim=True)).exp()]
            for j in range(near.start - 1, -1, -1):
                decay = alpha[:, j + 1 : near.start].prod(-1)
                weights.insert(0, (decay * (phi_q[:, i] * phi_k[:, j]).sum(-1))[:, None])
            weights = torch.cat(weights, 1)
            out[:, h, i] = torch.einsum("bj,bjd->bd", weights, values[:, : i + 1]) / weights.sum(-1, keepdim=True)
    return out


CASES = {"linear": ("linear", SMALL, {"attend": token_by_token})}


def random_entries(documents):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 2, 3, 23, 6), (2, 2, 23, 6))]
    values = torch.randn(2, 2, 23, 4, generator=generator, dtype=torch.float64)
    decays = -torch.rand(2, 2, 23, generator=generator, dtype=torch.float64)
    number = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in documents])
    arrives = torch.cat((torch.full((2, 2), -1), number[:, :-2]), dim=1)  # two tokens after the query of its number
    return draw[0], number, Entries(draw[1], values, decays, arrives)


@pytest.mark.parametrize("documents", [[[23, 0, 0], [23, 0, 0]], [[9, 1, 13], [1, 20, 2]]], ids=["alone", "packed"])
@pytest.mark.parametrize("chunk_size", [1, 4, 23, 64])
def test_chunks_are_the_recurrence_in_fp64(documents, chunk_size, monkeypatch):
    monkeypatch.setattr(linear_attention, "STATES_AT_ONCE", 2)  # so that states are computed from states of states
    queries, number, entries = random_entries(documents)
    earlier = entries.part(slice(0, 5)).state()
    start = slice(5, None)
    given = queries[:, :, :, start], number[:, start], entries.part(start), earlier
    leaves = [
        given[0].requires_grad_(),
        *(x.requires_grad_() for x in given[2][:3]),
        earlier.sums_BKFE.requires_grad_(),
    ]
    upstream, outputs = (
        torch.randn(2, 2, 3, 18, 4, dtype=torch.float64),
        (recurrent(*given), chunked(*given, chunk_size)),
    )
    results = [[out, *torch.autograd.grad(out, leaves, upstream)] for out in outputs]
    for steps, chunks in zip(*results, strict=True):
        assert (chunks - steps).abs().max() < 1e-10 * steps.abs().max()


def test_each_branch_changes_the_output(attending, ids):
    """The window alone is what LoLCATs' critics found: a linear branch that does nothing goes unseen in short texts."""
    model, tokens = attending("linear"), ids(1, 40)
    before = model(input_ids=tokens).logits
    for name in ("feature_map_q", "feature_map_k", "gate_weight", "window_factors"):
        values = [getattr(module.linear, name) for module in attention_modules(model)]
        kept = [value.data.clone() for value in values]
        for value in values:
            value.data.mul_(-3)
        changed = (model(input_ids=tokens).logits - before).abs().amax(-1)[0]
        assert changed[4:].min() > 1e-5, name
        assert changed[:3].max() < 1e-5, name  # the text so far is in the window
        for value, old in zip(values, kept, strict=True):
            value.data.copy_(old)


def test_a_window_as_long_as_the_text_is_full_attention(attending, method_of, ids):
    wide = attending(method_of("linear", sliding_window=40))(input_ids=ids(2, 40)).logits
    torch.testing.assert_close(wide, attending("full")(input_ids=ids(2, 40)).logits, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("fields", [{"layers": [1]}, {"full_attention_interval": 3}])
def test_other_layers_run_full_attention(tiny, method_of, ids, fields):
    model, full = tiny("llama", num_hidden_layers=3), tiny("llama", num_hidden_layers=3)
    method = method_of("linear", **fields)
    install(model, method, "sdpa")
    install(full, FullAttention(), "sdpa")
    linear = [layer for layer, module in enumerate(attention_modules(model)) if hasattr(module, "linear")]
    assert linear == fields.get("layers", [0, 1])
    outputs = [m.model(input_ids=ids(1, 40), output_hidden_states=True).hidden_states for m in (model, full)]
    assert torch.equal(outputs[0][linear[0]], outputs[1][linear[0]])
    assert not torch.equal(outputs[0][linear[0] + 1], outputs[1][linear[0] + 1])
    decoded = model(input_ids=ids(1, 40)[:, 30:], past_key_values=model(input_ids=ids(1, 40)[:, :30]).past_key_values)
    torch.testing.assert_close(decoded.logits, model(input_ids=ids(1, 40)).logits[:, 30:], rtol=1e-4, atol=5e-5)


def test_gates_begin_with_their_half_life_and_maps_as_the_identity(tiny, method_of):
    model = tiny("llama").bfloat16()
    install(model, method_of("linear"), "sdpa")
    learned = attention_modules(model)[0].linear
    assert {parameter.dtype for parameter in learned.parameters()} == {torch.float32}
    layout = Layout(length=5, num_attention_heads=4, num_key_value_heads=2, layer_idx=0)
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    phi_q, _, log_decay, factors = learned(q, k, k, layout)
    torch.testing.assert_close((20 * log_decay).exp(), torch.full((1, 2, 5), 0.5))
    torch.testing.assert_close(phi_q, torch.cat((q[..., :6].softmax(-1), (-q[..., :6]).softmax(-1)), -1))
    torch.testing.assert_close(factors, torch.full((4,), 0.1), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("first", "num_heads", "num_kv_heads"), [(0, 4, 2), (4, 4, 2), (2, 2, 1), (6, 1, 1)])
def test_ranks_that_share_a_row_take_what_belongs_to_their_heads(tiny, method_of, first, num_heads, num_kv_heads):
    model = tiny("llama", num_attention_heads=8, num_key_value_heads=4)
    install(model, method_of("linear"), "sdpa")
    learned = attention_modules(model)[0].linear
    for parameter in learned.parameters():
        parameter.data = torch.randn(parameter.shape)
    q, k = torch.randn(1, 8, 5, 8), torch.randn(1, 4, 5, 8)
    whole = learned(q, k, k, layout(0))
    here, kv = slice(first, first + num_heads), slice(first // 2, first // 2 + num_kv_heads)
    part = learned(q[:, here], k[:, kv], k[:, kv], layout(first))
    expected = whole[0][:, here], whole[1][:, kv], whole[2][:, kv], whole[3][here]
    assert all(torch.equal(a, b) for a, b in zip(part, expected, strict=True))


def layout(first_head):
    return Layout(length=5, num_attention_heads=8, num_key_value_heads=4, layer_idx=0, first_head=first_head)


def test_sums_stay_in_fp32_where_the_model_computes_in_bf16(tiny, method_of):
    """In bf16 a state would lose what a token adds to the sum of a thousand."""
    model, method = tiny("llama"), method_of("linear")
    install(model, method, "sdpa")
    module, zeros = attention_modules(model)[0], torch.zeros(1, 40, dtype=torch.int32)
    four_heads = replace(layout(0), num_attention_heads=4, num_key_value_heads=2)
    rows = Rows(positions_BS=zeros, documents_BS=zeros, first_query=0, num_queries=40, shared={})
    q, k, v = (torch.randn(1, heads, 40, 8).bfloat16() for heads in (4, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        call = SimpleNamespace(layout=four_heads, rows=rows, scaling=module.scaling)
        found = method.attend(module, q, k, v, call)
    expected = token_by_token(module.double(), q.double(), k.double(), v.double(), module.scaling)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


def test_distillation_trains_the_feature_maps_alone(run, tmp_path):
    """LoLCATs' attention transfer."""
    run("attention=linear", "attention.full_attention_interval=2", "attention.sliding_window=4",
        "attention.feature_dim=8", "objective=distillation", "objective.loss=attention_output", "objective.layers=all",
        "tuning=gates", "tuning.trainable=[]", "trainer.max_steps=2")  # fmt: skip
    names = {name.removeprefix("model.") for name in read_values(tmp_path / "run/checkpoints/step-00000002.ckpt")}
    maps = ("feature_map_q", "feature_map_k", "window_factors", "gate_weight", "gate_bias")
    assert names == {f"model.layers.0.self_attn.linear.{name}" for name in maps}


def test_feature_maps_learn_full_attention(tiny, method_of, ids):
    model, batch = tiny("llama", initializer_range=0.1), {"input_ids": ids(4, 64), "labels": ids(4, 64)}
    install(model, method_of("linear", feature_dim=8, chunk_size=16), "sdpa")
    learned = [value for name, value in model.requires_grad_(False).named_parameters() if ".linear." in name]
    optimizer = torch.optim.Adam([value.requires_grad_() for value in learned], lr=0.05)
    objective = Distillation(loss="attention_output", layers="all", gate_weight=0.0, gate_reduction="sum")
    losses = []
    for _ in range(30):
        loss = objective(model, batch | {"position_ids": torch.arange(64).expand(4, -1)})["attention_output"]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0], losses


def test_what_some_layers_learned_is_given_back(tiny, method_of):
    models, method = [tiny("llama") for _ in range(2)], method_of("linear", layers=[1])
    for model in models:
        install(model, method, "sdpa")
    with torch.no_grad():
        attention_modules(models[0])[1].linear.gate_bias.fill_(7)
    fill(models[1], method, take(models[0], method))
    assert (attention_modules(models[1])[1].linear.gate_bias == 7).all()
    assert not any(hasattr(module, "linear") for module in attention_modules(models[0]))


@pytest.mark.parametrize("name", ["full_attention_interval", "sliding_window", "feature_dim", "chunk_size"])
def test_sizes_must_be_positive(method_of, name):
    with pytest.raises(InputError, match=f"{name} must be positive, got 0"):
        method_of("linear", **{name: 0})


@pytest.mark.parametrize(
    ("fields", "config", "message"),
    [
        ({"layers": [0, 32]}, LlamaConfig(), r"llama has 32 layers, no 32"),
        ({"layers": []}, LlamaConfig(), r"no layer is linear"),
        ({"full_attention_interval": 1}, LlamaConfig(), r"no layer is linear"),
        ({"sliding_window": 9}, LlamaConfig(), r"sliding_window=9 is all of the longest sequence \(9\)"),
        ({"feature_dim": 129}, LlamaConfig(), r"feature_dim=129 is more than a head's 128"),
        ({}, MistralConfig(sliding_window=8), r"layer 0 of mistral sees 8 tokens"),
        ({"layers": [4, 5]}, Gemma2Config(sliding_window=8), r"layer 4 of gemma2 sees 8 tokens"),
        ({"layers": [5]}, Gemma2Config(sliding_window=8), r"caps attention scores"),
    ],
)
def test_what_does_not_fit_is_refused(method_of, fields, config, message):
    method_of("linear").check(LlamaConfig(), [4, 9])
    with pytest.raises(InputError, match=message):
        method_of("linear", **fields).check(config, [4, 9])


def test_two_ways_to_choose_layers_are_refused(method_of):
    with pytest.raises(InputError, match=r"attention.layers and attention.full_attention_interval"):
        method_of("linear", layers=[0], full_attention_interval=2)


def test_a_linear_layer_costs_the_same_per_token_in_any_long_row(method_of):
    method = method_of("linear", full_attention_interval=2)
    (short, heads), (long, _) = (method.parts(replace(layout(0), length=n))[0] for n in (1000, 100_000))
    assert heads == 8
    assert long.keys == pytest.approx(short.keys, abs=0.01)
    assert long.other_flops == short.other_flops
    assert method.parts(replace(layout(0), layer_idx=1)) == [(FullAttention(), 8)]
