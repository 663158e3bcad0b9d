"""Values of the wrong type or size are refused by the name of the option that was typed; what is shipped passes."""

import pytest
from omegaconf import OmegaConf

from launch.evaluate import run as evaluate
from lctrain import config
from lctrain.errors import InputError
from lctrain.validate import check_values

REFUSED = {
    "optimizer.lr=abc": "optimizer.lr=abc must be a number",
    "optimizer.betas=[0.9,x]": 'optimizer.betas=[0.9, "x"] must be a list',
    "sequence_length=abc": "sequence_length=abc must be a whole number",
    "sequence_length=0": "sequence_length=0 must be at least 2",
    "sequence_length=null": "sequence_length=null must be a whole number",
    "seed=-1": "seed=-1 must be within 0 and 4294967295",
    "attention=sliding_window attention.sliding_window=abc": (
        "attention.sliding_window=abc must be a whole number or a list of whole numbers"
    ),
    "attention=sliding_window attention.sliding_window=1e3": "attention.sliding_window=1000.0 must be a whole number",
    "attention=sliding_window attention.sliding_window=[8,x]": 'attention.sliding_window=[8, "x"] must be',
    "rope=yarn rope.beta_fast=abc": "rope.beta_fast=abc must be a number",
    "rope=yarn rope.factor=atuo": "rope.factor=atuo must be a number or auto",
    "tuning=lora tuning.r=0": "tuning.r=0 must be at least 1",
    "tuning=lora tuning.lora_dropout=1.5": "tuning.lora_dropout=1.5 must be within 0 and 1",
    "tuning=lora tuning.target_modules=q_proj": "tuning.target_modules=q_proj must be a list",
    "datamodule.micro_batch_size=0.5": "datamodule.micro_batch_size=0.5 must be a whole number",
    "scheduler.num_warmup_steps=-1": "scheduler.num_warmup_steps=-1 must be at least 0",
    "scheduler=trapezoid scheduler.num_cooldown_steps=-1": "scheduler.num_cooldown_steps=-1 must be at least 0",
    "trainer.max_steps=abc": "trainer.max_steps=abc must be a whole number",
    "memory.checkpoint_layers=many": "memory.checkpoint_layers=many must be a whole number or all",
    "model.revision=1234567": "model.revision=1234567 must be text",
    "objective.loss=tilde": "objective.loss=tilde must be auto or tiled or liger",
    "curriculum=staged curriculum.stages=[{fraction:abc}]": "curriculum.stages=",
    "callbacks.checkpoint.every_num_steps=2.5": "callbacks.checkpoint.every_num_steps=2.5 must be a whole number or",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_a_value_that_does_not_fit_is_named_as_it_was_typed(overrides):
    with pytest.raises(InputError) as caught:
        config.check(config.compose("train", overrides.split()))
    assert str(caught.value).startswith(REFUSED[overrides])
    assert "\n" not in str(caught.value)


ATTENTIONS = ("attention", "attention@evaluation_attention")


def shipped():
    given = {"model=scratch": " model.architecture={}", "data=hub": " data.name=x"}
    given |= {f"{group}=head_pattern": f" {group.partition('@')[2] or group}.path=x" for group in ATTENTIONS}
    given |= {"evaluation=longbench_qa": " evaluation.longbench_qa.path=x"}
    given |= {f"data={name}": " data.path=x" for name in ("text", "jsonl", "chat")}
    for group, (_, choices) in config.groups("train").items():
        yield from (f"{group}={choice}" + given.get(f"{group}={choice}", "") for choice in choices)


@pytest.mark.parametrize("overrides", list(shipped()))
def test_every_shipped_choice_passes(overrides):
    config.check(config.compose("train", overrides.split()))


@pytest.mark.parametrize("verb", ["evaluate", "plan", "benchmark"])
def test_every_verb_passes(verb):
    config.check(config.compose(verb))


def test_a_number_may_be_whole_or_not_and_a_list_may_stand_for_each_layer():
    words = "optimizer.lr=1 attention=sliding_window attention.sliding_window=[8,16] rope=yarn rope.factor=4"
    config.check(config.compose("train", words.split()))


@pytest.mark.parametrize("target", ["no.such.Thing", "builtins.dict", "json.loads"])
def test_what_says_nothing_of_its_types_takes_anything(target):
    node = {"a": {"_target_": target, "s": 1}}
    check_values(node, node)


def test_evaluate_needs_weights():
    cfg = config.compose("evaluate", ["model=scratch", "model.architecture={model_type:llama}"])
    config.check(cfg)
    with pytest.raises(InputError, match=r"give model\.path="):
        evaluate(cfg)


def test_local_paths_hold_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("base", "home/text", "home/set"):
        (tmp_path / folder).mkdir(parents=True)
    words = "run_dir=runs/a model.path=base data=text data.path=~/text resume=auto"
    cfg = config.compose("train", words.split())
    config.anchor_paths(cfg)
    assert (cfg.run_dir, cfg.model.path) == (str(tmp_path / "runs/a"), str(tmp_path / "base"))
    assert cfg.data.path == cfg.datamodule.corpus.path == str(tmp_path / "home/text")
    assert cfg.callbacks.checkpoint.folder == str(tmp_path / "runs/a/checkpoints")
    assert cfg.resume == "auto"
    cfg = config.compose("evaluate", ["model.path=base", "cache=duo"])
    config.anchor_paths(cfg)
    assert cfg.cache.pattern.path == str(tmp_path / "base")
    cfg = config.compose("benchmark", ["retrieval.pattern=base"])
    config.anchor_paths(cfg)
    assert cfg.retrieval.pattern == str(tmp_path / "base")


def test_a_hubs_id_and_what_is_not_there_stay_as_they_were_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = {"model": {"path": "some/model"}, "data": {"name": "some/set", "path": "???"}, "checkpoint": "a.ckpt"}
    cfg = OmegaConf.create({**typed, "run_dir": "${nowhere}", "output": "~/out"})
    config.anchor_paths(cfg)
    assert OmegaConf.to_container(cfg) == {**typed, "run_dir": "${nowhere}", "output": str(tmp_path.home() / "out")}


def test_a_run_may_be_called_by_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = config.compose("train", ["run_dir=2024"])
    config.anchor_paths(cfg)
    config.check(cfg)
    assert cfg.run_dir == str(tmp_path / "2024")
