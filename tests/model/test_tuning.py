import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from peft import PeftModel

from lctrain.attention.duo import DuoAttention
from lctrain.config import conf_dir
from lctrain.errors import InputError
from lctrain.model.head import hidden_states, token_losses


def tuning_of(name, **changes):
    config = OmegaConf.to_container(OmegaConf.load(conf_dir() / "tuning" / f"{name}.yaml"))
    return get_class(config.pop("_target_"))(**config | changes)


def trainable(model):
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


ADAPTERS = 2 * 4 * 2  # layers, q k v o, A and B
# Per layer: q and o are 32 → 32, k and v 32 → 16; r · (in + out) each.
NUM_ADAPTER_PARAMETERS = 2 * 8 * (2 * (32 + 32) + 2 * (32 + 16))
NORMS = 5  # two a layer, one at the end
NUM_PARAMETERS = 2 * 64 * 32 + 5 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # embeddings, norms, layers


def test_the_tunings_here_are_those_of_conf():
    assert {path.stem for path in (conf_dir() / "tuning").glob("*.yaml")} == {
        "frozen", "full", "gates", "lora", "longlora", "method", "modules",
    }  # fmt: skip


def test_the_method_alone(recipe):
    duo = DuoAttention(num_sink_tokens=2, recent_size=4, initial_gate=1.0, clamp=True)
    trained = trainable(recipe("llama", attention=duo, tuning=tuning_of("method")).build())
    assert trained == {f"model.layers.{layer}.self_attn.duo.head_gates": 2 for layer in (0, 1)}


def test_full(tiny):
    assert sum(trainable(tuning_of("full").apply(tiny("llama").requires_grad_(False))).values()) == NUM_PARAMETERS


def test_gates_train_alone(recipe):
    duo = DuoAttention(num_sink_tokens=2, recent_size=4, initial_gate=1.0, clamp=True)
    gates = recipe("llama", attention=duo, tuning=tuning_of("gates")).build()
    assert trainable(gates) == {f"model.layers.{layer}.self_attn.duo.head_gates": 2 for layer in (0, 1)}
    lora = recipe("llama", attention=duo, tuning=tuning_of("lora", trainable=["head_gates"])).build()
    assert len(trainable(lora)) == ADAPTERS + 2


def test_an_attention_without_gates_has_none_to_train(recipe):
    with pytest.raises(InputError, match="no parameter name holds 'head_gates'"):
        recipe("llama", tuning=tuning_of("gates")).check([64])


def test_lora_trains_its_adapters_alone(tiny):
    names = trainable(tuning_of("lora").apply(tiny("llama")))
    assert len(names) == ADAPTERS
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert sum(names.values()) == NUM_ADAPTER_PARAMETERS


def test_longlora_adds_embeddings_and_norms(tiny):
    """§3.3 of the paper: normalisation and the input embedding beside the adapters; the head stays."""
    names = trainable(tuning_of("longlora").apply(tiny("llama")))
    assert sum("norm" in name for name in names) == NORMS
    assert [name for name in names if "embed" in name] == ["base_model.model.model.embed_tokens.weight"]
    assert len(names) == ADAPTERS + NORMS + 1
    assert sum(names.values()) == NUM_ADAPTER_PARAMETERS + NORMS * 32 + 64 * 32


@pytest.mark.parametrize(("patterns", "count"), [(["norm"], 5), (["q_proj", "layers.1.mlp"], 2 + 3), (["lm_head"], 1)])
def test_modules_by_name(tiny, patterns, count):
    names = trainable(tuning_of("modules", trainable=patterns).apply(tiny("llama")))
    assert len(names) == count
    assert all(any(pattern in name for pattern in patterns) for name in names)


@pytest.mark.parametrize("name", ["full", "lora", "longlora", "modules"])
def test_a_step_moves_what_trains_and_nothing_else(tiny, ids, name):
    model = tuning_of(name).apply(tiny("llama"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokens = ids(1, 20)
    for _ in range(2):  # B starts at zero, so A moves in the second step
        loss, _ = token_losses(model, hidden_states(model, tokens, torch.arange(20)[None]), tokens.roll(-1))
        loss.backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(trainable(model))


def test_fields_of_lora_reach_peft(tiny):
    model = tuning_of("lora", r=4, lora_alpha=32, lora_dropout=0.25, target_modules=["up_proj"]).apply(tiny("llama"))
    assert isinstance(model, PeftModel)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (4, 8.0, 0.25)
    assert len(trainable(model)) == 4


def test_a_new_adapter_changes_nothing_yet(tiny, ids):
    tokens = ids(1, 12)
    assert torch.equal(
        tuning_of("longlora").apply(tiny("llama"))(input_ids=tokens).logits, tiny("llama")(input_ids=tokens).logits
    )


@pytest.mark.parametrize("name", ["lora", "longlora"])
def test_an_unknown_target_is_named(tiny, name):
    with pytest.raises(InputError, match=r"tuning.target_modules: LlamaForCausalLM has no module called q_porj"):
        tuning_of(name, target_modules=["q_porj", "v_proj"]).apply(tiny("llama"))


@pytest.mark.parametrize("name", ["modules", "longlora"])
def test_an_unknown_pattern_is_named(tiny, name):
    with pytest.raises(InputError, match=r"tuning.trainable: no parameter name holds 'nrom'"):
        tuning_of(name, trainable=["embed", "nrom"]).apply(tiny("llama"))


def test_adapters_on_the_head_are_refused(tiny):
    """The tiled loss reads the head's weight, where an adapter would never show."""
    with pytest.raises(InputError, match="no adapter on the output head"):
        tuning_of("lora", target_modules=["q_proj", "lm_head"]).apply(tiny("llama"))
