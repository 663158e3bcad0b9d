"""What is exported is the model that was trained, and plain transformers runs it."""

import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning import Callback
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lctrain.attention.head_pattern import HeadPatternAttention
from lctrain.attention.hierarchical_windows import HierarchicalWindows
from lctrain.cache.h2o import H2OCache
from lctrain.checkpoint import read_values
from lctrain.errors import InputError
from lctrain.export import export
from lctrain.heads import JSON, HeadPattern
from lctrain.memory.savings import NOTHING
from lctrain.model.install import install
from lctrain.model.learned import METHOD, method_of, values_for
from lctrain.model.recipe import PretrainedModel
from lctrain.model.serve import load
from lctrain.model.tuning import Frozen
from lctrain.rope.none import NoScaling

IDS = torch.randint(3, 64, (2, 64), generator=torch.Generator().manual_seed(1))


class Logits(Callback):
    """What the trained model itself says, behind the last step of the last run."""

    last: torch.Tensor

    def on_train_end(self, trainer, pl_module):
        pl_module.model.eval()
        with torch.no_grad():
            positions = torch.arange(IDS.shape[1]).expand_as(IDS)
            type(self).last = pl_module.model(input_ids=IDS, position_ids=positions, use_cache=False).logits


@pytest.fixture
def trained(run):
    """Trains two steps, enough to move every parameter that trains."""
    logits = f"+callbacks.logits._target_={__name__}.Logits"
    return lambda *overrides: run(logits, "trainer.max_steps=2", "optimizer.lr=0.05", *overrides)


@pytest.fixture
def reloaded(tmp_path):
    """Exports `tmp_path/run` and loads that in plain transformers: model, folder."""

    def reload(**options):
        folder = export(str(tmp_path / "run"), "auto", str(tmp_path / "out"), **options)
        return AutoModelForCausalLM.from_pretrained(folder).eval(), folder

    return reload


def same_logits(model):
    with torch.no_grad():
        return torch.allclose(model(input_ids=IDS).logits.float(), Logits.last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tuning", ["full", "lora", "longlora", "modules"])
@pytest.mark.parametrize("rope", ["none", "yarn", "ntk", "dynamic", "linear", "longrope", "llama3", "theta"])
def test_plain_transformers_gives_the_logits_of_the_trained_model(trained, reloaded, saved, tuning, rope):
    trained(f"tuning={tuning}", f"rope={rope}", *(["rope.extrapolate=true"] if rope == "none" else []))
    model, _ = reloaded()
    assert same_logits(model)
    base = AutoModelForCausalLM.from_pretrained(saved("llama", max_position_embeddings=32))
    assert not same_logits(base.eval())


NARROWER = ["attention=sliding_window", "attention.sliding_window=9"]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("mistral", []), ("mistral", NARROWER), ("gemma2", []), ("gemma3_text", []), ("gemma3_text", NARROWER)],
)
def test_a_models_own_window_and_the_chosen_one_are_exported(trained, reloaded, saved, family, overrides):
    base = saved(family, sliding_window=24, max_position_embeddings=32)
    trained(f"model.path={base}", *overrides)
    model, _ = reloaded()
    assert model.config.sliding_window == (9 if overrides else 24)
    assert same_logits(model)


def test_the_rope_is_in_the_config(trained, reloaded):
    trained("rope=yarn")
    _, folder = reloaded()
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn"
    assert config["rope_parameters"]["factor"] == 2
    assert config["rope_parameters"]["original_max_position_embeddings"] == 32
    assert (config["max_position_embeddings"], config["use_cache"]) == (64, True)
    assert "lctrain" not in (folder / "config.json").read_text()  # no attention implementation of ours


def test_a_resumed_run_exports_what_it_ended_with(run, trained, reloaded):
    longer = ["tuning=longlora", "rope=yarn", "scheduler.num_steps=4"]
    run(*longer, "trainer.max_steps=1", "optimizer.lr=0.05")
    trained(*longer, "resume=auto")
    assert same_logits(reloaded()[0])


def test_an_earlier_checkpoint_can_be_exported(trained, tmp_path):
    trained("tuning=lora", "callbacks.checkpoint.every_num_steps=1")
    path = tmp_path / "run/checkpoints/step-00000001.ckpt"
    folder = export(str(tmp_path / "run"), str(path), str(tmp_path / "first"))
    assert not same_logits(AutoModelForCausalLM.from_pretrained(folder).eval())
    assert path.name in (folder / "README.md").read_text()


def test_whoever_reads_the_recipe_reads_the_weights(trained, reloaded):
    trained()
    _, folder = reloaded()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_the_folder_is_whole(trained, reloaded, saved):
    trained("tuning=lora", "attention=streaming", "attention.num_sink_tokens=2", "attention.recent_size=8")
    model, folder = reloaded()
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "lctrain.yaml"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".partial"))]
    readme = (folder / "README.md").read_text()
    assert "StreamingAttention" in readme
    assert "64 tokens" in readme
    base = AutoTokenizer.from_pretrained(saved("llama", max_position_embeddings=32))
    assert AutoTokenizer.from_pretrained(folder)("w5 w9 w11")["input_ids"] == base("w5 w9 w11")["input_ids"]
    out = model.generate(IDS[:1, :40], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 44)


def test_the_dtype_is_that_of_the_training_or_the_one_asked_for(trained, reloaded):
    trained("tuning=lora", "model.dtype=float32")
    assert reloaded()[0].dtype == torch.float32
    model, folder = reloaded(dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16


def test_an_earlier_export_is_replaced_and_a_foreign_folder_is_not(trained, reloaded, tmp_path):
    trained()
    _, folder = reloaded()
    (folder / "stale").write_text("")
    reloaded()
    assert not (folder / "stale").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match=f"output={foreign} exists and is not an earlier export"):
        export(str(tmp_path / "run"), "auto", str(foreign))
    assert (foreign / "thesis.tex").read_text() == "years"


def test_an_export_that_fails_leaves_the_earlier_one(trained, reloaded, monkeypatch, tmp_path):
    trained()
    _, folder = reloaded()
    before = (folder / "model.safetensors").read_bytes()

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", refuse)
        with pytest.raises(OSError, match="No space left"):
            reloaded()
    assert (folder / "model.safetensors").read_bytes() == before
    reloaded()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


BESIDE = runpy.run_path(str(Path(__file__).parent / "attention" / "conftest.py"))
LEARNED = {name: (yaml, fields) for name, (yaml, fields, _) in BESIDE["CASES"].items() if BESIDE["method"](name).learns}


@pytest.mark.parametrize("name", LEARNED)
def test_what_a_method_learned_comes_with_the_export(trained, reloaded, saved, name):
    """For every method that learns: the folder's weights and method give the trained model, also when served."""
    yaml, fields = LEARNED[name]
    overrides = [f"++attention.{field}={json.dumps(value)}" for field, value in fields.items()]
    trained(f"attention={yaml}", *overrides, "tuning=lora")
    folder = reloaded()[1]
    recipe = PretrainedModel(
        path=str(folder), revision="main", use_safetensors=True, trust_remote_code=False, attention=method_of(folder),
        rope=NoScaling(), tuning=Frozen(), sequence_length=64, kernel="auto", layer_kernel="plain", dtype="auto",
        precision=None, memory=NOTHING,
    )  # fmt: skip
    model = recipe.build().eval()
    with torch.no_grad():
        positions = torch.arange(IDS.shape[1]).expand_as(IDS)
        torch.testing.assert_close(
            model(input_ids=IDS, position_ids=positions).logits, Logits.last, rtol=1e-4, atol=1e-4
        )
        unlearned = replace(recipe, path=str(saved("llama", max_position_embeddings=32))).build()
        assert not torch.allclose(unlearned(input_ids=IDS, position_ids=positions).logits, Logits.last, atol=1e-2)
    if not (folder / JSON).is_file():  # else it is served as its head pattern says
        served, policy = load(folder)
        with torch.no_grad():
            torch.testing.assert_close(served(input_ids=IDS).logits, Logits.last, rtol=1e-4, atol=1e-4)
        generated = served.generate(IDS, past_key_values=policy.new(served), max_new_tokens=4, do_sample=False)
        assert generated.shape[1] > IDS.shape[1]


def test_a_method_that_learned_with_other_settings_is_refused(trained, reloaded):
    trained("attention=hierarchical_windows", "attention.sliding_windows=[3,9]")
    _, folder = reloaded()
    assert values_for(HierarchicalWindows(sliding_windows=[3, 9], combine="projection"), folder)
    with pytest.raises(InputError, match=r"learned HierarchicalWindows\(.*give the same settings"):
        values_for(HierarchicalWindows(sliding_windows=[3, 8], combine="projection"), folder)
    with pytest.raises(InputError, match="H2OCache decides itself what heads see, instead of HierarchicalWindows"):
        load(folder, cache=H2OCache(budget=8, recent_size=4, pyramid_beta=1.0))
    for target in ("os.system", "lctrain.attention.base.Tensor", "lctrain.attention.base.torch.Tensor"):
        (folder / METHOD).write_text(f"_target_: {target}\ncommand: {{_target_: os.system}}\n")
        with pytest.raises(InputError, match=rf"_target_ {target} is no class of lctrain.attention"):
            load(folder)


DUO = ["attention=duo", "attention.num_sink_tokens=2", "attention.recent_size=8", "rope=linear"]


@pytest.mark.parametrize("tuning", ["tuning=gates", "tuning=lora tuning.trainable=[head_gates]"])
def test_gates_become_a_pattern_beside_plain_weights(run, trained, reloaded, tmp_path, tuning):
    trained(*DUO, *tuning.split(), "objective=duo", "optimizer.lr=0.3", "trainer.max_steps=1")
    learned = [value for name, value in read_values(tmp_path / "run/checkpoints/step-00000001.ckpt").items()
               if name.endswith("head_gates")]  # fmt: skip
    _, folder = reloaded()
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if "gate" in name and "gate_proj" not in name]  # noqa: SIM118
    pattern = HeadPattern.read(folder)
    torch.testing.assert_close(torch.tensor(pattern.gates), torch.stack(learned))
    assert (pattern.threshold, pattern.num_sink_tokens, pattern.recent_size) == (0.5, 64, 256)
    assert pattern.provenance["checkpoint"] == "step-00000001.ckpt"
    assert "llama" in pattern.provenance["architecture"]
    (folder / JSON).unlink()
    torch.testing.assert_close(torch.tensor(HeadPattern.read(folder).gates), torch.stack(learned))
    config = AutoConfig.from_pretrained(folder)
    assert (config.sink_size, config.recent_size) == (64, 256)
    pattern.check(config)
    assert "64 sinks and 256 recent tokens" in (folder / "README.md").read_text()


def test_a_model_of_which_only_gates_trained_is_the_base(trained, reloaded, saved):
    trained(*DUO, "tuning=gates", "rope=none", "rope.extrapolate=true")
    model, base = reloaded()[0], AutoModelForCausalLM.from_pretrained(saved("llama", max_position_embeddings=32)).eval()
    assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)


def test_what_is_deployed_is_decided_at_export_and_trained_on_from_there(trained, reloaded, tmp_path):
    trained(*DUO, "tuning=gates")
    _, folder = reloaded(streaming_share=0.75, num_sink_tokens=1, recent_size=5)
    pattern = HeadPattern.read(folder)
    assert pattern.retrieval_heads.sum() == 1
    assert (pattern.num_sink_tokens, pattern.recent_size) == (1, 5)
    deployed = ["attention=head_pattern", f"attention.path={folder}", "tuning=lora", f"run_dir={tmp_path}/tuned"]
    trained(*deployed, "rope=linear")
    tuned = export(str(tmp_path / "tuned"), "auto", str(tmp_path / "again"))
    assert HeadPattern.read(tuned) == pattern
    model = AutoModelForCausalLM.from_pretrained(tuned)
    install(model, HeadPatternAttention(path=str(tuned), threshold=None, streaming_share=None, num_sink_tokens=None,
                                        recent_size=None), "sdpa")  # fmt: skip
    assert same_logits(model.eval())
    served, policy = load(tuned)
    cache = policy.new(served)
    logits = [served(part, past_key_values=cache).logits for part in IDS.split(17, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), Logits.last, rtol=1e-4, atol=1e-4)


def test_deployment_of_a_run_without_gates_is_refused(trained, reloaded):
    trained()
    with pytest.raises(InputError, match=r"heads.threshold is for runs that train gates"):
        reloaded(threshold=0.5)


def test_what_cannot_be_exported_is_named(trained, tmp_path):
    run_dir, out = str(tmp_path / "run"), str(tmp_path / "out")
    with pytest.raises(InputError, match=r"run_dir=.*run holds no config.yaml"):
        export(run_dir, "auto", out)
    trained("tuning=lora")
    with pytest.raises(InputError, match="dtype=float31 is not a torch dtype"):
        export(run_dir, "auto", out, "float31")
    with pytest.raises(InputError, match="checkpoint=nowhere is missing or not whole"):
        export(run_dir, "nowhere", out)
    checkpoint = Path(run_dir, "checkpoints/step-00000002.ckpt")
    trained("tuning=modules", f"run_dir={tmp_path}/other")
    with pytest.raises(InputError, match="was written with another tuning"):
        export(str(tmp_path / "other"), str(checkpoint), out)
    shutil.rmtree(Path(run_dir, "checkpoints"))
    with pytest.raises(InputError, match="holds no whole checkpoint"):
        export(run_dir, "auto", out)
    assert not Path(out).exists()
