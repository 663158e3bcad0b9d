"""Find the memory of one training step by running it on tensors that have sizes but no data.

Every operation of forward, loss and backward runs on torch's fake tensors, and their storages are counted as they are
allocated and freed. So the numbers follow any architecture, tuning, precision and choice of what is recomputed. Only
operations that need a GPU are replaced by fakes. Not counted: CUDA's context and libraries (about 1 GiB),
fragmentation, NCCL's buffers.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import cache
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lctrain.attention.base import Attention, Cost
from lctrain.attention.identity import kind
from lctrain.errors import InputError
from lctrain.kernels.block_mask import BLOCK, MAX_LIST_BYTES
from lctrain.memory.host import Host
from lctrain.memory.savings import Savings
from lctrain.model.head import unwrap
from lctrain.plan.flops import layer_layout
from lctrain.plan.sample import sample
from lctrain.plan.simulation import Simulated, Step, simulate


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A step's memory in bytes on one device, part by part."""

    weights: int
    gradients: int  # counted as allocated from the start, as from a step's second micro-batch on
    optimizer: int
    buckets: int  # copies of gradients that ZeRO exchanges
    activations: int  # kept from forward to backward
    attention: int  # masks
    loss: int  # peak of the tiles of logits and the head's gradients
    backward: int  # peak of one layer's recomputation and gradients, beyond the activations
    update: int  # temporaries of the optimizer's step
    host: int  # pinned host memory, not on the device

    @property
    def resident(self) -> int:
        """Return the bytes that are held all the time."""
        return self.weights + self.gradients + self.optimizer + self.buckets

    @property
    def peak(self) -> int:
        """Return the most bytes held at once: loss, backward and the optimizer's step run one after the other."""
        step = self.activations + self.attention + max(self.loss, self.backward)
        return self.resident + max(step, self.update)

    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "host"}


class StepMemory:
    """A function from savings to the memory of a step of a tuned `model`, which is on the meta device.

    `speed_up` is the recipe's method, with the savings given. Only a few layers are simulated, and results are cached:
    savings that lead to the same sample of layers share a simulation.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Attention,
        step: Step,
        make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        speed_up: Callable[[PreTrainedModel, Host, Savings], None] = lambda model, host, savings: None,
    ) -> None:
        if step.kernel == "reference":
            raise InputError("kernel=reference holds every attention score and is not planned; use kernel=auto")
        self._model, self._method, self._step, self._speed_up = model, method, step, speed_up
        trained = [p for p in model.parameters() if p.requires_grad]
        self._itemsize = 2 if step.autocast else trained[0].itemsize
        self._gradients = sum(p.numel() * p.itemsize for p in trained)
        self._optimizer = _optimizer_states(make_optimizer, trained)
        self._simulated = cache(self._simulate)

    def __call__(self, savings: Savings) -> Memory:
        base = unwrap(self._model)  # type: ignore[arg-type]
        few = sample(base.get_decoder().layers, self._kinds(base.config.get_text_config()), savings)
        found = self._simulated(few.num_layers, few.savings)
        last = few.num_layers
        left_out = few.left_out_below(last, found.kept_by_layer)
        peaks = [peak + few.left_out_below(i, found.kept_by_layer) for i, peak in enumerate(found.peaks)]
        hosted = int(few.savings.offload)
        return Memory(
            weights=found.weights + few.num_left_out * found.layer_weights,
            gradients=self._gradients,
            optimizer=self._optimizer,
            buckets=0,  # DistributedDataParallel's buckets are the gradients themselves
            activations=found.kept - found.before + left_out,
            attention=_masks(base.config.get_text_config(), self._method, self._step, savings, self._itemsize),
            loss=found.loss,
            backward=max(0, max(peaks) - found.kept - left_out),
            update=self._gradients,  # torch's foreach update holds one temporary as large as all trained parameters
            host=found.host // hosted * int(savings.resolve(last + few.num_left_out).offload) if hosted else 0,
        )

    def _kinds(self, config: Any) -> list[Any]:
        layouts = [layer_layout(config, self._step.length, layer) for layer in range(config.num_hidden_layers)]
        return [tuple((kind(p), num_heads) for p, num_heads in self._method.parts(layout)) for layout in layouts]

    def _simulate(self, num_layers: int, savings: Savings) -> Simulated:
        decoder = unwrap(self._model).get_decoder()  # type: ignore[arg-type]
        layers = decoder.layers
        decoder.layers = layers[:num_layers]
        few = deepcopy(self._model)
        decoder.layers = layers
        return simulate(few, self._method, self._step, lambda model, host: self._speed_up(model, host, savings))


def _masks(config: Any, method: Attention, step: Step, savings: Savings, itemsize: int) -> int:
    """Return the bytes of one forward's masks: one per group of layers and heads, or one per head if heads differ."""
    num_shares = config.num_key_value_heads // (savings.kv_heads_at_a_time or config.num_key_value_heads)
    grids: dict[Any, int] = {}
    for layer in range(config.num_hidden_layers):
        layout = layer_layout(config, step.length, layer)
        for part, (pattern, num_heads) in enumerate(method.parts(layout)):
            if isinstance(pattern, Cost):
                if pattern.has_mask:
                    grids[layer, part] = step.rows * num_heads // step.sequence_parallel_size
                continue
            share, seen = max(1, num_heads // num_shares), kind(pattern)
            for first in range(0, num_heads, share):
                here = max(1, share // step.sequence_parallel_size)
                groups = pattern.head_groups(replace(layout, first_head=first), here)
                grids[seen, pattern.layer_group(layer), groups] = step.rows * len(groups)
    if step.kernel != "sdpa":
        # Indices of partial and of full blocks, by query and by key: 4 int32 tables of (L / 128)² entries.
        tables = 4 * 4 * ceil(step.length / BLOCK) ** 2
        return sum(min(num_grids * tables, 2 * MAX_LIST_BYTES) for num_grids in grids.values())
    # A bias for every visible rectangle: at most the causal half, L² / 2 entries, even if documents are packed.
    return sum(grids.values()) * itemsize * step.length**2 // 2


def _optimizer_states(make: Callable[[Iterable[nn.Parameter]], Optimizer], trained: list[nn.Parameter]) -> int:
    """Return the bytes of the optimizer's states: the number of elements times the bytes per element, measured on a
    small parameter of the same dtype.
    """

    def per_parameter(dtype: torch.dtype) -> float:
        small = nn.Parameter(torch.zeros(16, 16, dtype=dtype))
        small.grad = torch.zeros_like(small)
        optimizer = make([small])
        optimizer.step()
        states = [state for state in optimizer.state[small].values() if isinstance(state, Tensor)]
        return sum(state.numel() * state.itemsize for state in states if state.shape == small.shape) / small.numel()

    rates = {dtype: per_parameter(dtype) for dtype in {p.dtype for p in trained}}
    return int(sum(p.numel() * rates[p.dtype] for p in trained))
