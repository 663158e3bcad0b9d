"""Every yaml of conf/ composes and builds; every field of a run's own groups does something."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lctrain import config
from lctrain.checkpoint import read_values

ELSEWHERE = ("data", "curriculum", "evaluation")  # their rooms build every one of theirs
CHOICES = [
    (group, choice)
    for group, (_, choices) in config.groups("train").items()
    for choice in choices
    if group not in ELSEWHERE
]
REQUIRED = {  # what has no default
    ("model", "scratch"): "model.architecture={model_type: llama}",
    ("attention", "head_pattern"): "attention.path=somewhere",
    ("attention@evaluation_attention", "head_pattern"): "attention.path=somewhere",
}


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_yaml_composes_and_builds(group, choice, tmp_path):
    needed = [REQUIRED[group, choice]] if (group, choice) in REQUIRED else []
    name = group.partition("@")[0]
    spelling = {"evaluation_attention": "attention@evaluation_attention"}.get(name, name)
    cfg = config.compose("train", [f"{spelling}={choice}", f"run_dir={tmp_path}/run", *needed])
    config.check(cfg)
    if name not in ("experiment", "logger", "datamodule"):  # those start things, or need a tokenizer
        built = instantiate(cfg[name], _convert_="all")
        assert choice == "none" or built
    assert OmegaConf.create(config.dump(cfg)).sequence_length == cfg.sequence_length
    assert list(tmp_path.iterdir()) == []


def outcome(trained: Any, folder: Path) -> dict[str, Any]:
    """What a run did, without clocks and memory."""
    kept = ("step", "loss", "lr", "grad_norm", "sequence_length", "tokens")
    rows = [tuple(row[name] for name in kept) for row in trained.history]
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    weights = read_values(folder / "checkpoints" / checkpoints[-1])
    validated = "".join(path.read_text() for path in folder.glob("csv/*/metrics.csv")).count("\n")
    digest = [float(tensor.double().sum()) for tensor in weights.values()]
    strict = torch.are_deterministic_algorithms_enabled()
    return {"rows": rows, "checkpoints": checkpoints, "weights": digest, "validated": validated, "strict": strict}


EFFECTS = {  # each field that a run's groups have: what to run beside it, the change
    "optimizer/adamw": {"lr": "1e-3", "betas": "[0.5,0.5]", "eps": "1e-2", "weight_decay": "0.5"},
    "optimizer/sgd": {"lr": "1e-3", "momentum": "0.5", "weight_decay": "0.5"},
    "scheduler/cosine": {"num_warmup_steps": "1", "num_steps": "40", "min_ratio": "0.9"},
    "scheduler/warmup": {"num_warmup_steps": "1"},
    "scheduler/trapezoid": {"num_warmup_steps": "1", "num_cooldown_steps": "2", "num_steps": "2", "min_ratio": "0.9"},
    "trainer/default": {
        "max_steps": "3", "accumulate_grad_batches": "2", "gradient_clip_val": "1e-3", "precision": "bf16-mixed",
        "val_check_interval": "1", "deterministic": "true",
    },
    "callbacks/default": {
        "checkpoint.every_num_steps": "1", "checkpoint.every_num_minutes": "1e-9", "checkpoint.num_kept": "1",
    },
}  # fmt: skip
BESIDE = {"scheduler/trapezoid": ["scheduler.num_cooldown_steps=1"]}  # so short that all parts of it are passed
FIXED = {  # where it runs (tests/parallel), and what lctrain does itself
    *("accelerator", "devices", "num_nodes", "strategy", "watchdog.timeout_minutes"),
    *("check_val_every_n_epoch", "enable_checkpointing", "enable_progress_bar"),
    *("enable_model_summary", "use_distributed_sampler", "num_sanity_val_steps"),
    *("_target_", "_partial_", "metrics.folder", "checkpoint.folder", "watchdog.folder"),
}


def test_no_field_is_left_out():
    for name, fields in EFFECTS.items():
        node = OmegaConf.to_container(OmegaConf.load(config.conf_dir() / f"{name}.yaml"))
        flat = {key for key, _ in config._leaves({k: v for k, v in node.items() if not isinstance(v, list)})}
        lists = {k for k, v in node.items() if isinstance(v, list)}
        names = {key for key in flat | lists if key.rpartition(".")[2] not in ("_target_", "_partial_")}
        assert names - FIXED == set(fields)


@pytest.fixture(scope="module")
def usual() -> dict[str, dict[str, Any]]:
    """Outcomes with nothing changed, by optimizer and scheduler."""
    return {}


@pytest.mark.parametrize("name", EFFECTS)
def test_every_field_changes_something(run, tmp_path, usual, name):
    group, _, choice = name.partition("/")
    shape = ["logger=csv", "callbacks.checkpoint.every_num_steps=2", f"{group}={choice}", *BESIDE.get(name, [])]

    def of(folder: str, *overrides: str) -> dict[str, Any]:
        trained = run(f"run_dir={tmp_path}/{folder}", *shape, "scheduler.num_warmup_steps=2", *overrides)
        return outcome(trained, tmp_path / folder)

    same = name if name in ("optimizer/sgd", "scheduler/warmup", "scheduler/trapezoid") else "defaults"
    if same not in usual:
        usual[same] = of("usual")
    elif name == "trainer/default":
        assert usual[same] == of("usual")  # or nothing below means anything
    for field, value in EFFECTS[name].items():
        changed = of(field, f"{group}.{field}={value}")
        torch.use_deterministic_algorithms(False)
        assert changed != usual[same], field
