"""No inert option: every field of every attention, rope and tuning config changes something that shows."""

import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from lctrain.config import conf_dir

YAMLS = [path for group in ("attention", "rope", "tuning") for path in sorted((conf_dir() / group).glob("*.yaml"))]
ATTENTION = {
    path.stem: runpy.run_path(str(Path(__file__).parents[1] / "attention" / f"test_{path.stem}.py"))
    for path in (conf_dir() / "attention").glob("*.yaml")
}
# Sizes at which a pattern shows in 96 tokens, where the yaml's are for thousands.
SMALL = {f"attention/{name}": [*test["CASES"].values()][-1][1] for name, test in ATTENTION.items()}
ELSEWHERE = {
    "rope/none.extrapolate",  # changes what is refused, not what is computed: tests/training/test_run.py
    "attention/duo.clamp",  # acts behind a step: tests/training/test_gates.py
    "tuning/gates.trainable",  # there is nothing else to train
    "tuning/method.trainable",  # is empty: what another value does is seen with modules
}
# Of each field, another value, and what else has to change for it to be accepted.
OTHER = {
    **{f"attention/{name}": test.get("FIELDS", {}) for name, test in ATTENTION.items()},
    "rope/linear": {"factor": 2},
    "rope/ntk": {"factor": 2},
    "rope/dynamic": {"factor": 2},
    "rope/theta": {"rope_theta": 5e5},
    "rope/yarn": {"factor": 2, "beta_fast": 2.0, "beta_slow": 0.25, "attention_factor": 1.5},
    "rope/longrope": {"factor": 2, "short_factor": [1.5] * 16, "long_factor": [1.5] * 16},
    "rope/llama3": {"factor": 2, "low_freq_factor": 0.5, "high_freq_factor": 8.0},
    "tuning/modules": {"trainable": ["embed"]},
    "tuning/lora": {
        "r": 4, "lora_alpha": 64, "lora_dropout": 0.5, "target_modules": ["up_proj"], "trainable": ["norm"],
    },
    "tuning/longlora": {
        "r": 4, "lora_alpha": 64, "lora_dropout": 0.5, "target_modules": ["up_proj"], "trainable": ["norm"],
    },
}  # fmt: skip


def of(group_and_name, **changes):
    config = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{group_and_name}.yaml"))
    return get_class(config.pop("_target_"))(**config | SMALL.get(group_and_name, {}) | changes)


def key(path):
    return f"{path.parent.name}/{path.stem}"


def observed(recipe, ids, **parts):
    """Logits over two lengths in training mode, and their gradients: all that such a part may change."""
    torch.manual_seed(0)
    made = recipe("llama", shape={"max_position_embeddings": 64, "head_dim": 32}, sequence_length=96, **parts)
    model = made.build().train()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:  # starts at zero, which hides what the adapter does
            torch.nn.init.constant_(parameter, 0.01)
    seen = [model(input_ids=ids(1, length), use_cache=False).logits for length in (96, 48)]
    sum(logits.square().sum() for logits in seen).backward()
    return seen + [p.grad for p in model.parameters() if p.grad is not None]


def same(a, b):
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def cases():
    for path in YAMLS:
        config = OmegaConf.load(path)
        for field in fields(get_class(config["_target_"])):
            if f"{key(path)}.{field.name}" in ELSEWHERE:
                continue
            yield pytest.param(path, field.name, id=f"{key(path)}.{field.name}")


@pytest.mark.parametrize("path", YAMLS, ids=key)
def test_a_yaml_names_every_field(path):
    config = OmegaConf.load(path)
    assert set(config) - {"_target_"} == {field.name for field in fields(get_class(config["_target_"]))}
    assert len(path.read_text().splitlines()) <= 15


@pytest.mark.parametrize(("path", "field"), list(cases()))
def test_every_field_changes_something(recipe, ids, path, field):
    group, name = path.parent.name, key(path)
    value = OTHER[name][field]
    value, beside = value if isinstance(value, tuple) else (value, {})
    observed(recipe, ids, **{group: of(name)})  # what a process builds first may draw numbers that later builds do not
    before = observed(recipe, ids, **{group: of(name)})
    assert same(before, observed(recipe, ids, **{group: of(name)}))  # or the difference below would mean nothing
    assert not same(before, observed(recipe, ids, **{group: of(name, **{field: value}, **beside)}))
