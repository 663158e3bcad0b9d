"""Timing of the overhead: tokens/s of `lctrain train` against a plain loop on the same model and batches."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from lctrain.benchmark import plain
from lctrain.data.batch import Batch
from lctrain.errors import InputError
from lctrain.tables import show
from lctrain.training.run import train

GOAL = 0.95  # share of the plain loop's tokens/s


def overhead(cfg: DictConfig) -> dict[str, object]:
    """Run both in turn, `num_repeats` times, so that other load on the machine affects both.

    Both use the same batches, the same attention (except for packed documents), clipping and AdamW. The rate is the
    median over steps, then over repetitions. Write overhead.json into run_dir.
    """
    for name in ("num_steps", "num_repeats"):
        if not isinstance(cfg[name], int) or cfg[name] < 1:
            raise InputError(f"{name}={cfg[name]} must be a positive integer")
    folder = Path(cfg.run_dir)
    target = folder / "overhead.json"
    if target.exists():
        raise InputError(f"{target} exists; choose another run_dir")
    measured: dict[str, list[float]] = {"lctrain": [], "plain": []}
    first_losses: dict[str, float] = {}
    for repeat in range(cfg.num_repeats):
        trained = train(OmegaConf.merge(cfg, {"run_dir": str(folder / f"lctrain-{repeat}")}))  # type: ignore[arg-type]
        measured["lctrain"].append(trained.tokens_per_second)
        first_losses["lctrain"] = trained.history[0]["loss"]
        rate, first_losses["plain"] = _plain(cfg)
        measured["plain"].append(rate)
    rates = {name: median(values) for name, values in measured.items()}
    result: dict[str, object] = {
        "tokens_per_second": rates,
        "ratio": rates["lctrain"] / rates["plain"],
        "goal": GOAL,
        "repeats": measured,
        "first_loss": first_losses,
        "num_threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    target.write_text(json.dumps(result, indent=2) + "\n")
    _print(measured, rates, target)
    return result


def _plain(cfg: DictConfig) -> tuple[float, float]:
    torch.manual_seed(cfg.seed)
    recipe = instantiate(cfg.model, _convert_="all")
    config = recipe.config()
    model = recipe.load(config, recipe.loaded_dtype(config))
    model.set_attn_implementation("sdpa")
    return plain.train(model, _batches(cfg, recipe), lr=cfg.optimizer.lr, clip=cfg.trainer.gradient_clip_val)


def _batches(cfg: DictConfig, recipe: object) -> Sequence[Sequence[Batch]]:
    """Return the micro-batches of each step, as the trainer would request them."""
    data = instantiate(cfg.datamodule, tokenizer=recipe.tokenizer, _convert_="all")  # type: ignore[attr-defined]
    data.trainer = instantiate(cfg.trainer, logger=False, _convert_="all")
    return [data.step_batches(step) for step in range(cfg.num_steps)]


def _print(measured: dict[str, list[float]], rates: dict[str, float], target: Path) -> None:
    table = Table("tokens/s", *(str(i + 1) for i in range(len(measured["plain"]))), "median")
    for name, values in measured.items():
        table.add_row(name, *(f"{value:,.0f}" for value in values), f"{rates[name]:,.0f}")
    show(table)
    ratio = rates["lctrain"] / rates["plain"]
    goal = f"{'at or above' if ratio >= GOAL else 'below'} the goal of {GOAL}"
    print(f"lctrain runs at {ratio:.3f} of the plain loop, {goal}; {target}")
