"""The memory of one training step, found by running it on tensors that have sizes and no data.

Every operation of forward, loss and backward runs on torch's fake tensors, and their storages are counted as they come
and go. So the numbers follow any architecture, tuning, precision and choice of what is recomputed. Only what runs on a
card alone has stand-ins. Not seen: CUDA's context and libraries (about 1 GiB), fragmentation, NCCL's buffers.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, PreTrainedModel

from lctrain.attention.base import Attention
from lctrain.errors import InputError
from lctrain.kernels.block_mask import BLOCK, MAX_LIST_BYTES
from lctrain.kernels.linear_cross_entropy import MAX_LOGITS, linear_cross_entropy
from lctrain.memory.host import Host
from lctrain.model.head import softcap, unwrap
from lctrain.plan.flops import layer_layout
from lctrain.plan.stand_ins import CountingHost, attend_by


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device. No part is shared between devices: data parallelism replicates them all."""

    weights: int
    gradients: int  # counted as if they were there already: true from the second micro-batch of a step on
    optimizer: int
    buckets: int  # the copy of the gradients that data parallelism exchanges
    activations: int  # kept from forward to backward
    attention: int  # masks
    loss: int  # tiles of logits, the head's gradients, autocast's copies of the weights, at their most
    backward: int  # one layer's recomputation and gradients, at their most, beyond what was kept
    update: int  # temporaries of the optimizer's step
    host: int  # not on the device: what waits in pinned host memory

    @property
    def resident(self) -> int:
        """There all the time."""
        return self.weights + self.gradients + self.optimizer + self.buckets

    @property
    def peak(self) -> int:
        """The loss, the backward and the optimizer's step follow each other."""
        step = self.activations + self.attention + max(self.loss, self.backward)
        return self.resident + max(step, self.update)

    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "host"}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a micro-batch on one device is."""

    rows: int
    length: int
    kernel: str  # not reference
    autocast: bool  # bf16-mixed
    num_devices: int
    sequence_parallel_size: int = 1  # of them have a part of each row
    fused_loss: bool = False  # Liger's, else tiles
    num_compared: int = 0  # states of a teacher, in place of the head's loss


def step_memory(
    model: nn.Module,
    method: Attention,
    step: Step,
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    hasten: Callable[[PreTrainedModel, Host], None] = lambda model, host: None,
) -> Memory:
    """Memory of `step` with a tuned `model` on the meta device, which is used up. `hasten` is the recipe's."""
    if step.kernel == "reference":
        raise InputError("kernel=reference holds every attention score and is not planned; use kernel=auto")
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.itemsize for p in trained)
    host = CountingHost()
    with FakeTensorMode():
        _materialize(model)
        base = unwrap(model)  # type: ignore[arg-type]
        hasten(base, host)
        AttentionInterface.register("lctrain_plan", attend_by(method, step.length))
        base.set_attn_implementation("lctrain_plan")
        weights, activations, loss, backward = _simulate(base, step)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=_optimizer_states(make_optimizer, trained),
        buckets=gradients if step.num_devices > 1 else 0,
        activations=activations,
        attention=_masks(base.config.get_text_config(), method, step, 2 if step.autocast else trained[0].itemsize),
        loss=loss,
        backward=backward,
        update=gradients,  # torch's foreach update holds one temporary of the size of all that trains
        host=host.num_bytes,
    )


def _simulate(model: PreTrainedModel, step: Step) -> tuple[int, int, int, int]:
    """Bytes of the weights, kept by the forward, and at most beyond that in the loss and in the backward."""
    model.train()
    ids = torch.empty(step.rows, step.length // step.sequence_parallel_size, dtype=torch.int64)
    given = torch.empty(1, 1, 1, 1)  # a mask that is there already, so that transformers builds none
    with _Storages() as storages:
        for tensor in (*model.parameters(), *model.buffers()):
            storages.count(tensor)
        weights = storages.live
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        before = storages.restart()
        with torch.autocast("cpu", torch.bfloat16, enabled=step.autocast):
            decoder = model.get_decoder()
            hidden = decoder(input_ids=ids, position_ids=ids, attention_mask=given, use_cache=False).last_hidden_state
            forward = storages.live
        casts = forward - storages.restart()  # autocast's copies of the weights, which it drops after the loss
        kept = forward - casts
        if step.num_compared:
            loss = casts + _distance(hidden, step.num_compared)
        elif step.fused_loss:
            loss = casts + _fused_loss(model, hidden)
        else:
            loss = casts + _loss(model, hidden, step.autocast, storages)
        storages.restart()
        if hidden.requires_grad:
            hidden.backward(torch.empty_like(hidden))
    return weights, kept - before, loss, max(0, storages.peak - kept)


def _loss(model: PreTrainedModel, hidden: Tensor, autocast: bool, storages: "_Storages") -> int:
    """Most bytes in the loss and its backward; from the third tile on they are a line in the number of tokens."""
    head = model.get_output_embeddings()
    tile, num_tokens = max(1, MAX_LOGITS // head.weight.shape[0]), hidden.shape[0] * hidden.shape[1]

    def most(num_tokens: int) -> int:
        source = torch.empty(num_tokens, hidden.shape[-1], dtype=hidden.dtype, requires_grad=hidden.requires_grad)
        labels = torch.empty(num_tokens, dtype=torch.int64)
        before = storages.restart()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            valid = source.clone()  # as selecting the valid tokens does
            total, _ = linear_cross_entropy(valid, head.weight, head.bias, labels, softcap=softcap(model))
        del valid
        if total.requires_grad:
            total.backward()
        return storages.peak - before

    if num_tokens <= 3 * tile:
        return most(num_tokens)
    two, three = most(2 * tile), most(3 * tile)
    return int(two + (three - two) * (num_tokens - 2 * tile) // tile)


def _distance(hidden: Tensor, num_compared: int) -> int:
    """Teacher's and student's states where every token has a label, and of one of them both and a difference in fp32.

    The teacher's forward keeps nothing else, and is over before the student's begins.
    """
    return hidden.numel() * (2 * hidden.itemsize * num_compared + 3 * 4)


def _fused_loss(model: PreTrainedModel, hidden: Tensor) -> int:
    """Liger's: the gradient of the hidden states, and logits of as many tokens as make them about that large."""
    vocab_size, hidden_size = model.get_output_embeddings().weight.shape
    num_tokens = hidden.numel() // hidden_size
    tile = 2 ** ceil(log2(ceil(num_tokens / ceil(vocab_size / hidden_size))))
    return int(num_tokens * hidden_size + tile * vocab_size) * hidden.itemsize


class _Storages(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return out

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:  # else a view
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, identity: int, num_bytes: int) -> None:
        self._known.discard(identity)
        self.live -= num_bytes

    def restart(self) -> int:
        """What is live now; the peak is counted anew from here."""
        self.peak = self.live
        return self.live


def _masks(config: Any, method: Attention, step: Step, itemsize: int) -> int:
    """Bytes of the masks of one forward: one per group of layers, with a head dimension where heads differ."""
    grids: dict[Any, int] = {}
    for layer in range(config.num_hidden_layers):
        layout = layer_layout(config, step.length, layer)
        for pattern, num_heads in method.parts(layout):
            heads = num_heads // step.sequence_parallel_size if pattern.heads_differ(layout) else 1
            grids[repr(pattern), pattern.layer_group(layer)] = step.rows * heads
    if step.kernel != "sdpa":
        # Indices of partial and of full blocks, by query and by key: 4 int32 tables of (L / 128)² entries.
        tables = 4 * 4 * ceil(step.length / BLOCK) ** 2
        return sum(min(num_grids * tables, 2 * MAX_LIST_BYTES) for num_grids in grids.values())
    # A bias for every visible rectangle: at most the causal half, L² / 2 entries, where documents are packed.
    return sum(grids.values()) * itemsize * step.length**2 // 2


def _optimizer_states(make: Callable[[Iterable[nn.Parameter]], Optimizer], trained: list[nn.Parameter]) -> int:
    """Bytes = numel · bytes of state per parameter; the latter is seen on a small parameter of the same dtype."""

    def per_parameter(dtype: torch.dtype) -> float:
        small = nn.Parameter(torch.zeros(16, 16, dtype=dtype))
        small.grad = torch.zeros_like(small)
        optimizer = make([small])
        optimizer.step()
        states = [state for state in optimizer.state[small].values() if isinstance(state, Tensor)]
        return sum(state.numel() * state.itemsize for state in states if state.shape == small.shape) / small.numel()

    rates = {dtype: per_parameter(dtype) for dtype in {p.dtype for p in trained}}
    return int(sum(p.numel() * rates[p.dtype] for p in trained))


def _materialize(model: nn.Module) -> None:
    """Meta tensors become fake ones on the CPU, where autocast works. Tied ones stay tied."""
    fakes: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor not in fakes:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                fakes[tensor] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
            setattr(module, name, fakes[tensor])
