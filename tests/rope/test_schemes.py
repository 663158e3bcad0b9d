"""Every scheme of conf/rope against the formula of its paper, written out in fp64."""

import math

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lctrain.config import conf_dir
from lctrain.errors import InputError

THETA, DIM, ORIGINAL, TARGET = 10000.0, 32, 64, 512
PAIRS = range(DIM // 2)
SHAPE = {"head_dim": DIM, "max_position_embeddings": ORIGINAL}


def scheme_of(name, **changes):
    config = OmegaConf.to_container(OmegaConf.load(conf_dir() / "rope" / f"{name}.yaml"))
    return get_class(config.pop("_target_"))(**config | changes)


def stretched(model, name, target=TARGET, **changes):
    """A copy of the model's config with the scheme applied."""
    config = AutoConfig.for_model(**model.config.to_dict())
    scheme_of(name, **changes).apply(config, target)
    return config


def rebuilt(model, config):
    """The model's weights under another config."""
    other = AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def plain(theta=THETA):
    return [theta ** (-2 * i / DIM) for i in PAIRS]


def ramp(x, low, high):
    return min(1.0, max(0.0, (x - low) / (high - low)))


def linear(s):
    return [f / s for f in plain()], 1.0


def ntk(s):
    return plain(THETA * s ** (DIM / (DIM - 2))), 1.0


def yarn(s, beta_fast=32.0, beta_slow=1.0, attention_factor=None):
    """Ramp over dimensions, as released: between those that turn beta_fast and beta_slow times, rounded outwards."""

    def dimension(turns):
        return DIM * math.log(ORIGINAL / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = max(math.floor(dimension(beta_fast)), 0), min(math.ceil(dimension(beta_slow)), DIM - 1)
    gamma = [1 - ramp(i, low, high) for i in PAIRS]
    frequencies = [(1 - g) * f / s + g * f for g, f in zip(gamma, plain(), strict=True)]
    return frequencies, attention_factor or 0.1 * math.log(s) + 1


def llama3(s, low_freq_factor=1.0, high_freq_factor=4.0):
    def smooth(f):
        turns = ORIGINAL * f / (2 * math.pi)
        share = ramp(turns, low_freq_factor, high_freq_factor)
        return (1 - share) * f / s + share * f

    return [smooth(f) for f in plain()], 1.0


def dynamic(s, length):
    base = THETA * (s * max(length, ORIGINAL) / ORIGINAL - (s - 1)) ** (DIM / (DIM - 2))
    return plain(base), 1.0


def longrope(s, length, short_factor=None, long_factor=None):
    short = short_factor or [1.0] * len(PAIRS)
    long = long_factor or [s ** (2 * i / (DIM - 2)) for i in PAIRS]
    divisors = long if length > ORIGINAL else short
    return [f / d for f, d in zip(plain(), divisors, strict=True)], math.sqrt(1 + math.log(s) / math.log(ORIGINAL))


LISTS = {"short_factor": [1.0 + 0.01 * i for i in PAIRS], "long_factor": [2.0 + i for i in PAIRS]}
CASES = {  # yaml, fields, length of the input -> frequencies and the factor of cos and sin
    "none": ("none", {}, 512, (plain(), 1.0)),
    "linear": ("linear", {}, 512, linear(8)),
    "linear by 3": ("linear", {"factor": 3}, 512, linear(3)),
    "ntk": ("ntk", {}, 512, ntk(8)),
    "ntk by 2.5": ("ntk", {"factor": 2.5}, 512, ntk(2.5)),
    "theta": ("theta", {}, 512, (plain(1e7), 1.0)),
    "theta 500k": ("theta", {"rope_theta": 500_000}, 512, (plain(5e5), 1.0)),
    "yarn": ("yarn", {}, 512, yarn(8)),
    "yarn by 4": (
        "yarn",
        {"factor": 4, "beta_fast": 6, "beta_slow": 0.5, "attention_factor": 1.5},
        512,
        yarn(4, 6, 0.5, 1.5),
    ),
    "llama3": ("llama3", {}, 512, llama3(8)),
    "llama3 by 5": ("llama3", {"factor": 5, "low_freq_factor": 0.5, "high_freq_factor": 3}, 512, llama3(5, 0.5, 3)),
    "dynamic": ("dynamic", {}, 512, dynamic(8, 512)),
    "dynamic, short": ("dynamic", {}, 50, dynamic(8, 50)),
    "dynamic by 2": ("dynamic", {"factor": 2}, 300, dynamic(2, 300)),
    "longrope": ("longrope", {}, 512, longrope(8, 512)),
    "longrope, short": ("longrope", {}, 64, longrope(8, 64)),
    "longrope by lists": ("longrope", LISTS, 65, longrope(8, 65, **LISTS)),
    "longrope by lists, short": ("longrope", LISTS | {"factor": 4}, 60, longrope(4, 60, **LISTS)),
}


def test_the_schemes_here_are_those_of_conf():
    assert {path.stem for path in (conf_dir() / "rope").glob("*.yaml")} == {case[0] for case in CASES.values()}


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", **SHAPE)


@pytest.mark.parametrize("case", CASES)
def test_angles_are_the_papers(model, case):
    name, fields, length, (frequencies, factor) = CASES[case]
    rotary = rebuilt(model, stretched(model, name, **fields)).model.rotary_emb
    positions = torch.arange(length)[None]
    cos, sin = rotary(torch.zeros(1), positions)
    assert rotary.inv_freq.dtype == cos.dtype == torch.float32
    torch.testing.assert_close(
        rotary.inv_freq.double(), torch.tensor(frequencies, dtype=torch.float64), rtol=1e-6, atol=0
    )
    angles = positions[0, :, None].double() * torch.tensor(frequencies, dtype=torch.float64).repeat(2)
    torch.testing.assert_close(cos[0].double(), factor * angles.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sin[0].double(), factor * angles.sin(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_rope_init_functions(model, case):
    name, fields, length, _ = CASES[case]
    config = stretched(model, name, **fields)
    rotary = rebuilt(model, config).model.rotary_emb
    rotary(torch.zeros(1), torch.arange(length)[None])
    compute = ROPE_INIT_FUNCTIONS.get(config.rope_parameters["rope_type"], rotary.compute_default_rope_parameters)
    expected, factor = compute(config, seq_len=length)
    torch.testing.assert_close(rotary.inv_freq, expected, rtol=1e-6, atol=0)
    assert rotary.attention_scaling == pytest.approx(factor)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_gives_the_same_logits_in_plain_transformers(model, ids, tmp_path, case):
    name, fields, length, _ = CASES[case]
    adapted, tokens = rebuilt(model, stretched(model, name, **fields)), ids(1, length)
    expected = adapted(input_ids=tokens).logits
    if name != "none":
        difference = (expected - model(input_ids=tokens).logits).abs().max()
        assert (difference > 1e-2) != (case == "dynamic, short")
    adapted.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "ntk", "dynamic", "yarn", "longrope", "llama3"])
def test_a_target_within_the_original_length_scales_nothing(model, name):
    config = stretched(model, name, target=ORIGINAL // 2)
    rotary = rebuilt(model, config).model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq.double(), torch.tensor(plain(), dtype=torch.float64), rtol=1e-6, atol=0)
    assert rotary.attention_scaling == 1
    assert config.max_position_embeddings == ORIGINAL


@pytest.mark.parametrize("name", ["linear", "ntk", "theta", "yarn", "longrope", "llama3"])
def test_the_config_tells_the_new_length(model, name):
    assert stretched(model, name).max_position_embeddings == TARGET


@pytest.mark.parametrize("name", ["linear", "ntk", "dynamic", "yarn", "longrope", "llama3"])
def test_replacing_a_scheme_starts_from_the_original_length(tiny, name):
    """A model that was stretched before: 64 to 128 by YaRN, to 512 now."""
    before = tiny("llama", **SHAPE)
    was = stretched(before, "yarn", target=128)
    assert was.max_position_embeddings == 128
    scheme_of(name).apply(was, TARGET)
    fresh = stretched(before, name)
    a, b = (rebuilt(before, config).model.rotary_emb for config in (was, fresh))
    for length in (40, 512):
        for x, y in zip(*(rotary(torch.zeros(1), torch.arange(length)[None]) for rotary in (a, b)), strict=True):
            assert torch.equal(x, y)


def test_layers_with_their_own_rope_keep_it_where_they_see_locally(tiny):
    model = tiny("gemma3_text", sliding_window=16, layer_types=["sliding_attention", "full_attention"], **SHAPE)
    config = stretched(model, "linear")
    assert config.rope_parameters["sliding_attention"] == model.config.rope_parameters["sliding_attention"]
    old, new = model.model.rotary_emb, rebuilt(model, config).model.rotary_emb
    assert torch.equal(new.sliding_attention_inv_freq, old.sliding_attention_inv_freq)
    torch.testing.assert_close(new.full_attention_inv_freq, old.full_attention_inv_freq / 8)


@pytest.mark.parametrize("name", ["linear", "yarn", "longrope", "ntk", "dynamic", "llama3", "theta"])
def test_a_part_of_the_head_may_rotate(tiny, name):
    """Phi-3 may rotate half of a head: the exponents run over that half."""
    rope = {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.5}
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=ORIGINAL, **SHAPE)
    config = stretched(model, name)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    rotary = rebuilt(model, config).model.rotary_emb
    assert rotary(torch.zeros(1), torch.arange(512)[None])[0].shape[-1] == DIM // 2


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gemma", "gemma2"])
@pytest.mark.parametrize("name", ["linear", "ntk", "dynamic", "yarn", "longrope", "llama3", "theta"])
def test_families_rotate_alike(tiny, model, model_type, name):
    other = tiny(model_type, **SHAPE)
    positions = torch.arange(512)[None]
    a, b = (rebuilt(m, stretched(m, name)).model.rotary_emb(torch.zeros(1), positions)[0] for m in (model, other))
    torch.testing.assert_close(a, b)


class TestRefusals:
    @pytest.mark.parametrize("name", ["linear", "ntk", "dynamic", "yarn", "longrope", "llama3"])
    def test_a_factor_below_one(self, model, name):
        with pytest.raises(InputError, match=r"rope.factor must be at least 1 or auto, got 0.5"):
            stretched(model, name, factor=0.5)

    @pytest.mark.parametrize("name", ["linear", "ntk", "dynamic", "yarn", "longrope", "llama3"])
    def test_a_factor_that_is_no_number(self, model, name):
        with pytest.raises(InputError, match=r"rope.factor must be at least 1 or auto, got atuo"):
            stretched(model, name, factor="atuo")

    @pytest.mark.parametrize("theta", [1, 0, -5])
    def test_a_base_that_turns_nothing(self, theta):
        with pytest.raises(InputError, match="rope_theta must be above 1"):
            scheme_of("theta", rope_theta=theta)

    @pytest.mark.parametrize("field", ["short_factor", "long_factor"])
    def test_lists_of_another_length(self, model, field):
        with pytest.raises(InputError, match=rf"rope.{field} needs 16 entries, one per rotated pair, got 3"):
            stretched(model, "longrope", **{field: [1.0, 2.0, 3.0]})

    def test_a_model_without_rotary_positions(self):
        config = AutoConfig.for_model("gpt2")
        with pytest.raises(InputError, match="gpt2 has no rotary positions to stretch; use rope=none"):
            scheme_of("linear").apply(config, TARGET)
        scheme_of("none").apply(config, TARGET)

    def test_ramps_that_run_backwards(self, model):
        with pytest.raises(InputError, match="high_freq_factor"):
            stretched(model, "llama3", low_freq_factor=4.0, high_freq_factor=4.0)
        with pytest.raises(InputError, match="beta_fast"):
            stretched(model, "yarn", beta_fast=1.0, beta_slow=32.0)


def test_none_leaves_every_entry():
    config = LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    before = config.to_dict()
    scheme_of("none").apply(config, TARGET)
    assert config.to_dict() == before
