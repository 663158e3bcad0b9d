"""Run `lctrain plan`: show the cost of a run as tables and a verdict. No weights are read and no GPU is used."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from lctrain.attention.full import FullAttention
from lctrain.errors import DoesNotFit, InputError
from lctrain.kernels.choose import choose
from lctrain.memory.host import Host, memory_limit
from lctrain.memory.savings import NOTHING, AutoSavings, Savings
from lctrain.model.head import unwrap
from lctrain.model.install import demand
from lctrain.model.layers import parts_heads
from lctrain.model.recipe import ModelRecipe
from lctrain.parallel.mesh import Mesh
from lctrain.parallel.ulysses import num_repeats, shares_heads
from lctrain.plan.cards import card
from lctrain.plan.exchange import Exchange
from lctrain.plan.fakes import LAYER_KERNELS
from lctrain.plan.flops import attention_flops, linear_flops
from lctrain.plan.memory import Memory, StepMemory
from lctrain.plan.savings import MAX_SHARES, choose_savings
from lctrain.plan.seconds import work
from lctrain.plan.sharding import Sharding
from lctrain.plan.simulation import Step
from lctrain.tables import show

log = logging.getLogger(__name__)

GIB = 2**30
SPARE = 0.94  # usable share of a memory; the rest is for fragmentation, libraries and other processes
PROCESS = 4 * GIB  # host memory of a process with CUDA's libraries, besides the memory that it pins
OPTIONS = ("device", "device_memory", "host_memory", "num_devices")  # options of `lctrain plan` alone

WHAT = {
    "weights": "parameters and buffers",
    "gradients": "of what trains",
    "optimizer": "its states",
    "buckets": "gradients in exchange between devices",
    "activations": "kept from forward to backward",
    "attention": "masks, and the kernel's backward",
    "loss": "a tile of logits, the head's gradients",
    "backward": "one layer's recomputation and gradients",
    "update": "temporaries of the optimizer's step",
}


HELD = {  # what a device holds at each of ZeRO's stages
    0: "all of the model",
    1: "a share of the optimizer",
    2: "a share of the optimizer and the gradients",
    3: "a share of everything",
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The cost of a step at one row length of the curriculum; FLOPs are forward and backward, without recomputation."""

    length: int
    num_steps: int
    flops_per_token: float
    computing: float | None  # seconds of a step, recomputation counted; None on a CPU and with offloaded states
    waiting: float | None  # seconds of a step in which a device waits for others

    @property
    def seconds(self) -> float | None:
        """Return the seconds of a step, or None if they are unknown."""
        return None if self.computing is None or self.waiting is None else self.computing + self.waiting


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a run. `tokens_per_step` counts all devices, `memory` is one device's."""

    parameters: int
    trainable: int
    tokens_per_step: int
    mesh: Mesh
    sharding: Sharding
    kv_head_copies: int  # devices that compute with the same key-value head of a row
    exchange_ratio: float  # bytes exchanged to share a row, relative to a model with enough key-value heads
    kernel: str
    device: str
    savings: Savings | AutoSavings
    stages: list[Stage]
    memory: Memory

    @property
    def num_steps(self) -> int:
        return sum(stage.num_steps for stage in self.stages)

    @property
    def hours(self) -> float | None:
        """Return the hours of all steps, without validation and evaluation; None if a stage's time is unknown."""
        seconds = [(stage.seconds, stage.num_steps) for stage in self.stages]
        return sum(one * num for one, num in seconds if one) / 3600 if all(one for one, _ in seconds) else None

    @property
    def flops(self) -> float:
        return sum(stage.num_steps * stage.flops_per_token for stage in self.stages) * self.tokens_per_step


def main(cfg: DictConfig) -> None:
    """Print the plan. Raises InputError for a config that can't train."""
    _check_positive(device_memory=cfg.device_memory)
    planned = plan(cfg)
    for table in (_sizes(planned), _compute(planned), _memory(planned)):
        show(table)
    print(verdict(planned, cfg))


def plan(cfg: DictConfig) -> Plan:
    """Return the plan of the run that `lctrain train` would start from `cfg`, with `cfg.num_devices` on each node."""
    _check_positive(num_devices=cfg.num_devices, num_nodes=cfg.trainer.num_nodes, max_steps=cfg.trainer.max_steps)
    _check_positive(accumulate=cfg.trainer.accumulate_grad_batches, micro_batch_size=cfg.datamodule.micro_batch_size)
    recipe: ModelRecipe = instantiate(cfg.model, _convert_="all")
    curriculum = instantiate(cfg.curriculum, _convert_="all")
    recipe.check_attention(curriculum.lengths(), cfg.sequence_parallel_size)
    world, accumulate = cfg.num_devices * cfg.trainer.num_nodes, cfg.trainer.accumulate_grad_batches
    mesh = Mesh(rank=0, world_size=world, sequence_parallel_size=cfg.sequence_parallel_size)
    micro_batch_tokens = cfg.datamodule.micro_batch_size * cfg.sequence_length
    tokens_per_step = micro_batch_tokens * accumulate * mesh.data_parallel_size
    model = _skeleton(recipe)
    parameters = list(model.parameters())
    steps = Counter(curriculum.length_at(step, tokens_per_step) for step in range(cfg.trainer.max_steps))
    longest = max(steps)
    kind = "cpu" if cfg.trainer.accelerator == "cpu" else "cuda"
    step = _step(cfg, recipe, longest, kind, num_devices=world)
    limits = {"device": cfg.device_memory * GIB, "host": cfg.host_memory * GIB}
    recipe, memory = _memory_of(cfg, recipe, step, kind, **limits)
    sharding, text = Sharding.of(cfg, world), recipe.config().get_text_config()
    num_heads, num_kv_heads = text.num_attention_heads, text.num_key_value_heads
    copies = num_repeats(num_kv_heads, mesh.sequence_parallel_size)
    stages = [_stage(cfg, recipe, model, mesh, sharding, length, steps[length], kind) for length in sorted(steps)]
    return Plan(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        tokens_per_step=tokens_per_step,
        mesh=mesh,
        sharding=sharding,
        kv_head_copies=copies,
        exchange_ratio=(num_heads + copies * num_kv_heads) / (num_heads + num_kv_heads),
        kernel=step.kernel,
        device=cfg.device if kind == "cuda" else "CPU",
        savings=recipe.memory,
        stages=stages,
        memory=memory,
    )


def _stage(
    cfg: DictConfig,
    recipe: ModelRecipe,
    model: nn.Module,
    mesh: Mesh,
    sharding: Sharding,
    length: int,
    num_steps: int,
    device_type: str,
) -> Stage:
    config, teacher = recipe.config().get_text_config(), bool(_num_compared(cfg, recipe))
    attention = attention_flops(config, recipe.attention, length)
    taught = attention_flops(config, FullAttention(), length) if teacher else 0.0
    computing = waiting = None
    if device_type == "cuda" and not sharding.offload_optimizer:
        computing, waiting = _seconds(cfg, recipe, model, mesh, sharding, attention, taught)
    flops = linear_flops(model, teacher) + 3 * attention + taught
    return Stage(length=length, num_steps=num_steps, flops_per_token=flops, computing=computing, waiting=waiting)


def _seconds(
    cfg: DictConfig,
    recipe: ModelRecipe,
    model: nn.Module,
    mesh: Mesh,
    sharding: Sharding,
    attention: float,
    taught: float,
) -> tuple[float, float]:
    """Return the seconds that a device computes in a step, and the seconds that it waits for others."""
    assert isinstance(recipe.memory, Savings)
    used, num_micro_batches = card(cfg.device), cfg.trainer.accumulate_grad_batches
    row_tokens = cfg.datamodule.micro_batch_size * cfg.sequence_length
    tokens = num_micro_batches * row_tokens // mesh.sequence_parallel_size
    token = work(model, attention, recipe.memory, recipe.precision == "fp8", taught)
    computing = token.seconds(used) * tokens
    exchange = Exchange.of(
        recipe.config().get_text_config(),
        mesh,
        cfg.num_devices,
        sharding,
        recipe.memory,
        weights=sharding.halved(sum(p.numel() * p.itemsize for p in model.parameters())),
        trained=sum(p.numel() * p.itemsize for p in model.parameters() if p.requires_grad),
        teacher=bool(taught),
    )
    return computing, exchange.seconds(used, tokens, num_micro_batches, computing)


def resolve(
    cfg: DictConfig, recipe: ModelRecipe, lengths: Sequence[int], device: torch.device, num_devices: int
) -> ModelRecipe:
    """Return the recipe with savings that fit on `device`, one of `num_devices`, in place of memory=auto.

    Raises DoesNotFit if none fit.
    """
    if not isinstance(recipe.memory, AutoSavings):
        return recipe
    host = memory_limit() // max(1, num_devices // cfg.trainer.num_nodes)
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (host, host)
    if num_devices > 1:  # all ranks must choose the same savings, or those that recompute less wait for the others
        free = total
    step = _step(cfg, recipe, lengths[-1], device.type, num_devices)
    limits = {"device": free * SPARE, "host": max(0, host * SPARE - PROCESS)}
    resolved, memory = _memory_of(cfg, recipe, step, device.type, **limits)
    limit = (recipe.memory.device_memory or free * SPARE / GIB) * GIB
    if memory.peak > limit:
        raise DoesNotFit(
            f"memory=auto: {memory.peak / GIB:.2f} GiB are needed at the least and there are {limit / GIB:.2f}; "
            "take a shorter sequence_length, a smaller model or more devices"
        )
    log.info("memory=auto: %s; %.1f GiB planned", resolved.memory, memory.peak / GIB)
    return resolved


def _step(cfg: DictConfig, recipe: ModelRecipe, length: int, device_type: str, num_devices: int) -> Step:
    """Return a description of a micro-batch with rows of `length`."""
    num_compared = _num_compared(cfg, recipe)
    return Step(
        rows=-(-cfg.datamodule.micro_batch_size * cfg.sequence_length // length),
        length=length,
        kernel=_kernel(recipe, device_type),
        autocast=cfg.trainer.precision == "bf16-mixed" or recipe.autocasts(),
        num_devices=num_devices,
        sequence_parallel_size=cfg.sequence_parallel_size,
        fused_loss=not num_compared and cfg.objective.loss != "tiled" and device_type == "cuda",
        num_compared=num_compared,
    )


def _memory_of(
    cfg: DictConfig, recipe: ModelRecipe, step: Step, device_type: str, *, device: float, host: float
) -> tuple[ModelRecipe, Memory]:
    """Return the recipe with its savings, chosen here under memory=auto, and a step's memory with these savings."""
    kernels = LAYER_KERNELS if recipe.layer_kernel != "plain" and device_type == "cuda" else None

    def speed_up(model: PreTrainedModel, host: Host, savings: Savings) -> None:
        replace(recipe, memory=savings).speed_up(model, kernels, host)

    skeleton, sharding = _skeleton(recipe), Sharding.of(cfg, step.num_devices)
    num_parameters = sum(p.numel() for p in skeleton.parameters())
    largest = max((p.numel() for p in skeleton.parameters() if p.requires_grad), default=0)
    memory_of = StepMemory(skeleton, recipe.attention, step, instantiate(cfg.optimizer), speed_up)

    def planned(savings: Savings) -> Memory:
        return sharding.apply(memory_of(savings), num_parameters, largest)

    given = recipe.memory
    if isinstance(given, Savings):
        return recipe, planned(given)
    device = given.device_memory * GIB if given.device_memory else device
    host = given.host_memory * GIB if given.host_memory else host
    config = recipe.config().get_text_config()
    chosen, memory = choose_savings(
        config.num_hidden_layers,
        step.length // step.sequence_parallel_size,
        planned,
        device=device,
        host=host if device_type == "cuda" else 0,
        dropout=recipe.drops_out(),
        heads=_heads_at_a_time(recipe, skeleton, step, sharding),
    )
    return replace(recipe, memory=chosen), memory


def _num_compared(cfg: DictConfig, recipe: ModelRecipe) -> int:
    """Return how many of a teacher's states a step keeps; 0 without a teacher."""
    num_layers = recipe.config().get_text_config().num_hidden_layers
    return int(instantiate(cfg.objective, _convert_="all").num_compared(num_layers))


def _heads_at_a_time(recipe: ModelRecipe, model: nn.Module, step: Step, sharding: Sharding) -> list[int]:
    """Return the numbers of key-value heads that attention could compute at a time, descending."""
    if recipe.drops_out() or sharding.stage == 3 or not parts_heads(unwrap(model)):  # type: ignore[arg-type]
        return []
    config = recipe.config().get_text_config()
    kv_heads, shared = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    size = step.sequence_parallel_size
    parts = [kv_heads // n for n in range(2, MAX_SHARES + 1) if kv_heads % n == 0]
    return [n for n in parts if shares_heads(n * shared, n, size)]


def _kernel(recipe: ModelRecipe, device_type: str) -> str:
    """Return the name of the kernel that would run on `device_type`."""
    config = recipe.config()
    return choose(recipe.kernel, demand(config, recipe.torch_dtype(config), device_type))[0]


def _check_positive(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise InputError(f"{name}={value} must be a positive number to plan with")


def _skeleton(recipe: ModelRecipe) -> nn.Module:
    """Return the model as it would train, on the meta device."""
    config = recipe.config()
    text = config.get_text_config()
    rope = text.rope_parameters
    if rope.get("rope_type") in ("dynamic", "longrope"):  # these read positions, which have no data; sizes are equal
        text.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return recipe.skeleton(config)


def verdict(planned: Plan, cfg: DictConfig) -> str:
    """Return one line: whether the peak fits into `device_memory`, and if not, by how much and what would help."""
    spare = cfg.device_memory - planned.memory.peak / GIB
    if spare >= 0:
        return f"fits: {planned.memory.peak / GIB:.2f} of {cfg.device_memory:g} GiB, {spare:.2f} GiB to spare"
    helping = ", ".join(_remedies(planned, cfg)) or "a shorter sequence_length, a smaller model, a larger device"
    peak = f"{planned.memory.peak / GIB:.2f} GiB needed, {-spare:.2f} more than the {cfg.device_memory:g} GiB there are"
    return f"does not fit: {peak}; what would help: {helping}"


def _remedies(planned: Plan, cfg: DictConfig) -> Iterator[str]:
    """Yield unused options that shrink large parts of the memory, those above a tenth of the peak."""
    memory = planned.memory
    large = {name for name, size in memory.parts().items() if size > memory.peak / 10}
    if "activations" in large and planned.savings == NOTHING:
        yield "memory=auto"
    if large & {"activations", "backward"} and cfg.datamodule.micro_batch_size > 1:
        yield "a smaller datamodule.micro_batch_size with more trainer.accumulate_grad_batches"
    if "attention" in large and planned.kernel == "sdpa":
        yield "kernel=flex"
    if large & {"gradients", "optimizer"} and planned.trainable == planned.parameters:
        yield "tuning=longlora"
    if large & {"weights", "optimizer"} and planned.mesh.world_size > 1 and planned.sharding.stage < 3:
        yield "strategy=zero3"
    if "gradients" in large and planned.sharding.stage == 3 and not planned.sharding.half_precision:
        yield "strategy.half_precision=true"
    if "weights" in large and memory.weights > 3 * planned.parameters:
        yield "model.dtype=bfloat16"


def _sizes(planned: Plan) -> Table:
    table = Table("run", "")
    table.add_row("parameters", f"{planned.parameters:,}")
    table.add_row("trainable", f"{planned.trainable:,} ({planned.trainable / planned.parameters:.2%})")
    table.add_row("devices", _devices(planned))
    table.add_row("tokens per optimizer step", f"{planned.tokens_per_step:,}")
    table.add_row("memory", str(planned.savings))
    table.add_row(
        "tokens of the run", f"{planned.num_steps * planned.tokens_per_step:,} in {planned.num_steps:,} steps"
    )
    if planned.hours is not None:
        world = planned.mesh.world_size
        table.add_row("hours", f"{planned.hours:,.3g} on {planned.device}, {planned.hours * world:,.3g} of all devices")
    return table


def _devices(planned: Plan) -> str:
    shared = planned.mesh.sequence_parallel_size
    rows = f", {shared} to a row" if shared > 1 else ""
    copies = ""
    if planned.kv_head_copies > 1:
        copies = f" (each key-value head on {planned.kv_head_copies}, {planned.exchange_ratio:.2f} times the exchange)"
    return f"{planned.mesh.world_size:,}{rows}{copies}, each with {HELD[planned.sharding.stage]}"


def _compute(planned: Plan) -> Table:
    table = Table("row length", "steps", "FLOPs per token", "per step", "total", "seconds per step", "of these waiting")
    for stage in planned.stages:
        per_step = stage.flops_per_token * planned.tokens_per_step
        amounts = stage.flops_per_token, per_step, per_step * stage.num_steps, stage.seconds, stage.waiting
        table.add_row(f"{stage.length:,}", f"{stage.num_steps:,}", *("" if a is None else f"{a:.3g}" for a in amounts))
    table.add_section()
    table.add_row("all", f"{planned.num_steps:,}", "", "", f"{planned.flops:.3g}", "", "")
    return table


def _memory(planned: Plan) -> Table:
    table = Table("memory of a device", "GiB", "", caption="CUDA's context and fragmentation come on top")
    for name, size in planned.memory.parts().items():
        table.add_row(name, f"{size / GIB:,.2f}", WHAT[name])
    table.add_section()
    table.add_row("peak", f"{planned.memory.peak / GIB:,.2f}", "they are not all there at once")
    table.add_row("host", f"{planned.memory.host / GIB:,.2f}", "pinned, beside the device")
    return table
