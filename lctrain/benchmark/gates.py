"""Timing of gate training: tokens/s of `attention=duo` against the straightforward ways, on the same rows."""

from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from lctrain.attention.duo import DuoAttention
from lctrain.benchmark.measure import forget, now, peak_memory
from lctrain.benchmark.points import DOES_NOT_FIT
from lctrain.benchmark.random_model import RandomModel
from lctrain.benchmark.step import write
from lctrain.benchmark.straightforward import ConcatenatedDistillation, ConcatenatedDuoAttention, DenseKernel
from lctrain.data.batch import IGNORED, Batch
from lctrain.errors import DoesNotFit, InputError
from lctrain.memory.savings import NOTHING
from lctrain.model.install import install
from lctrain.model.recipe import ModelRecipe
from lctrain.plan.run import resolve
from lctrain.tables import show
from lctrain.training.distillation import Distillation
from lctrain.training.gates import gates_of
from lctrain.training.module import LongContextModule

EVERY_LAYER = replace(NOTHING, checkpoint_layers="all")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train gates; all but lctrain's recompute every layer, as the authors' code does."""

    title: str
    attention: type[DuoAttention] = DuoAttention
    objective: type[Distillation] = Distillation
    dense: bool = False
    installed: bool = False  # True: transformers' layers and torch's kernels


OURS = "lctrain"
CONCATENATED = Way(
    title="[full; mixed] concatenated, lctrain's kernels",
    attention=ConcatenatedDuoAttention,
    objective=ConcatenatedDistillation,
)
WAYS = {
    OURS: Way(title=OURS),
    "dense": Way(title="two passes, dense masks", dense=True),
    "concatenated": CONCATENATED,
    "concatenated_installed": replace(
        CONCATENATED, title="[full; mixed] concatenated, torch's and transformers' own", installed=True
    ),
}


def gates(cfg: DictConfig) -> list[dict[str, Any]]:
    """Time `num_steps` steps, after an untimed first one, of each of `ways`.

    Write gates.json into run_dir after every measurement.
    """
    module: LongContextModule = instantiate(cfg.module, _convert_="all")
    _check(cfg, module)
    target, rows = Path(cfg.run_dir) / "gates.json", list[dict[str, Any]]()
    for length, name in product(cfg.lengths, cfg.ways):
        rows.append({"way": name, "length": length} | _measured(cfg, module, WAYS[name], length))
        write(target, rows)
    _show(rows, target)
    return rows


def _check(cfg: DictConfig, module: LongContextModule) -> None:
    for name in ("num_steps", "num_answer_tokens"):
        if not isinstance(cfg[name], int) or cfg[name] < 1:
            raise InputError(f"{name}={cfg[name]} must be a positive integer")
    unknown = [way for way in cfg.ways if way not in WAYS]
    if unknown or not cfg.ways:
        raise InputError(f"ways: {unknown[0] if unknown else 'an empty list'} is none of {', '.join(WAYS)}")
    objective = module.objective
    if not (isinstance(module.recipe.attention, DuoAttention) and isinstance(objective, Distillation)):
        raise InputError("benchmark gates trains gates: give attention=duo tuning=gates objective=duo")
    if (objective.loss, objective.layers) != ("hidden_state", "last"):
        raise InputError("benchmark gates compares the last hidden states; use objective=duo as it is")


def _measured(cfg: DictConfig, module: LongContextModule, way: Way, length: int) -> dict[str, Any]:
    device = instantiate(cfg.trainer, logger=False, _convert_="all").strategy.root_device
    forget(device)
    try:
        recipe = _recipe(cfg, module.recipe, way, device, length)
        row = _train(cfg, module, recipe, way, _rows(cfg, recipe, device, length))
    except (torch.OutOfMemoryError, DoesNotFit):
        return {"seconds": [], "error": DOES_NOT_FIT}
    return row | {"device_memory": peak_memory(device), "memory": str(recipe.memory)}


def _recipe(cfg: DictConfig, recipe: ModelRecipe, way: Way, device: torch.device, length: int) -> RandomModel:
    attention = way.attention(**{f.name: getattr(recipe.attention, f.name) for f in fields(DuoAttention)})
    random = RandomModel.like(recipe, device, sequence_length=length, attention=attention)
    random.check_attention([length])
    row = OmegaConf.merge(cfg, {"sequence_length": length, "datamodule": {"micro_batch_size": 1}})
    if way.installed:
        random = replace(random, kernel="cudnn" if device.type == "cuda" else "sdpa", layer_kernel="plain")
    own = way is WAYS[OURS]
    settled = resolve(row, random, [length], device, 1) if own else replace(random, memory=EVERY_LAYER)  # type: ignore[arg-type]
    assert isinstance(settled, RandomModel)
    settled.check([length], device.type)
    return settled


def _rows(cfg: DictConfig, recipe: ModelRecipe, device: torch.device, length: int) -> list[Batch]:
    """Return one row of random tokens per step; only its last tokens have labels."""
    generator = torch.Generator().manual_seed(cfg.seed)
    vocab_size = recipe.config().get_text_config().vocab_size
    ids = torch.randint(0, vocab_size, (1 + cfg.num_steps, 1, length), generator=generator).to(device)
    unlabelled = torch.arange(length, device=device) < length - cfg.num_answer_tokens
    positions = torch.arange(length, device=device)[None]
    return [{"input_ids": i, "labels": i.masked_fill(unlabelled, IGNORED), "position_ids": positions} for i in ids]


def _train(
    cfg: DictConfig, module: LongContextModule, recipe: RandomModel, way: Way, batches: list[Batch]
) -> dict[str, Any]:
    """Run a plain loop of whole steps, the same for all ways; return their times, and loss and gradients of the first.

    The first step is not timed.
    """
    torch.manual_seed(cfg.seed)
    model: PreTrainedModel = recipe.build(recipe.device)  # type: ignore[assignment]
    if way.dense:
        install(model, recipe.attention, DenseKernel())
    assert isinstance(module.objective, Distillation)
    objective = way.objective(**{f.name: getattr(module.objective, f.name) for f in fields(Distillation)})
    optimizer, seconds, first = module.make_optimizer(gates_of(model)), list[float](), dict[str, Any]()
    for batch in batches:
        start = now(recipe.device)
        with torch.autocast(recipe.device.type, torch.bfloat16, enabled=recipe.autocasts()):
            terms = objective(model.train(), batch)
        loss = sum(terms.values(), torch.zeros((), device=recipe.device)) / cfg.num_answer_tokens
        loss.backward()
        gradients = [cast(Tensor, gate_K.grad).tolist() for gate_K in gates_of(model)]
        first = first or {"loss": float(loss.detach()), "gradients": gradients}
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now(recipe.device) - start)
    return {"seconds": seconds[1:], **first}


def _rate(row: dict[str, Any]) -> float:
    return float(row["length"] / median(row["seconds"]))


def _show(rows: list[dict[str, Any]], target: Path) -> None:
    table = Table("way", "tokens", "tokens/s", "lctrain's is", "GiB", "memory")
    ours = {row["length"]: _rate(row) for row in rows if row["way"] == OURS and row["seconds"]}
    for row in rows:
        title = WAYS[row["way"]].title
        if not row["seconds"]:
            table.add_row(title, f"{row['length']:,}", row["error"])
            continue
        ratio = f"{ours[row['length']] / _rate(row):.2f}×" if row["length"] in ours else ""
        memory = f"{row['device_memory']:.1f}", row["memory"]
        table.add_row(title, f"{row['length']:,}", f"{_rate(row):,.0f}", ratio, *memory)
    show(table)
    print(target)
