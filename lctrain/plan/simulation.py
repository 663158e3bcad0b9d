"""Simulate a training step on torch's fake tensors, which have sizes but no data, and count their storages."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, PreTrainedModel

from lctrain.attention.base import Attention
from lctrain.losses.linear_cross_entropy import MAX_LOGITS, linear_cross_entropy
from lctrain.memory.host import Host
from lctrain.model.head import softcap, unwrap
from lctrain.plan.fakes import CountingHost, attend_by, loss_of


@dataclass(frozen=True, kw_only=True)
class Step:
    """A micro-batch on one device, and how it is computed."""

    rows: int
    length: int
    kernel: str  # any but reference
    autocast: bool  # whether the forward computes in bf16
    num_devices: int
    sequence_parallel_size: int = 1  # devices that share each row
    fused_loss: bool = False  # whether Liger computes the loss, else tiles do
    num_compared: int = 0  # compared states of a teacher, whose distance then replaces the head's loss


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Bytes of one simulated step. Live bytes include all storages that exist; lists have an entry per layer."""

    weights: int
    layer_weights: int
    before: int  # live before the forward
    kept: int  # live after the forward
    kept_by_layer: list[int]  # live after each layer's forward
    loss: int  # the loss's peak, beyond `kept`
    peaks: list[int]  # most live in each layer's backward; the last entry is for the modules after the layers
    host: int


def simulate(
    model: nn.Module, method: Attention, step: Step, speed_up: Callable[[PreTrainedModel, Host], None]
) -> Simulated:
    """Simulate one step of a tuned `model` on the meta device, which this changes. `speed_up` is the recipe's."""
    host = CountingHost()
    with FakeTensorMode():
        _materialize(model)
        base = unwrap(model)  # type: ignore[arg-type]
        speed_up(base, host)
        AttentionInterface.register("lctrain_plan", attend_by(method, step.length, step.sequence_parallel_size))
        base.set_attn_implementation("lctrain_plan")
        return _run(base, step, host)


def _run(model: PreTrainedModel, step: Step, host: CountingHost) -> Simulated:
    model.train()
    ids = torch.empty(step.rows, step.length // step.sequence_parallel_size, dtype=torch.int64)
    given = torch.empty(1, 1, 1, 1)  # a ready mask, so that transformers builds none
    decoder = model.get_decoder()
    with Storages() as storages:
        for tensor in _tensors(model):
            storages.count(tensor)
        weights = storages.live
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        before = storages.restart()
        marks = _Marks(storages, decoder.layers)
        with torch.autocast("cpu", torch.bfloat16, enabled=step.autocast, cache_enabled=False):
            hidden = decoder(input_ids=ids, position_ids=ids, attention_mask=given, use_cache=False).last_hidden_state
        kept = storages.restart()
        marks.end_forward()
        loss = _loss(model, hidden, step, storages)
        storages.restart()
        total = loss_of(hidden)
        del hidden
        if total.requires_grad:
            total.backward()
        marks.end_layer()
    own = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(decoder.layers[0])}
    return Simulated(
        weights=weights,
        layer_weights=sum(own.values()),
        before=before,
        kept=kept,
        kept_by_layer=marks.kept,
        loss=loss,
        peaks=marks.peaks,
        host=host.num_bytes,
    )


class _Marks:
    """A recorder of the live and peak bytes where layers begin and end."""

    def __init__(self, storages: "Storages", layers: Any) -> None:
        self.kept: list[int] = []
        self.peaks = [0] * (len(layers) + 1)
        self._storages, self._layer = storages, len(layers)
        self._hooks = [layer.register_forward_hook(self._end_forward_of) for layer in layers]

    def _end_forward_of(self, layer: nn.Module, args: Any, output: Any) -> None:
        hidden, index = output if isinstance(output, Tensor) else output[0], len(self.kept)
        self.kept.append(self._storages.live)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self.end_layer(index))

    def end_forward(self) -> None:
        """Remove the hooks, so that layers that are recomputed later do not count as the forward."""
        for hook in self._hooks:
            hook.remove()

    def end_layer(self, next_layer: int = -1) -> None:
        """Record the peak of the current layer's backward, after which `next_layer`'s backward runs."""
        self.peaks[self._layer] = self._storages.peak
        self._storages.restart()
        self._layer = next_layer


def _loss(model: PreTrainedModel, hidden: Tensor, step: Step, storages: "Storages") -> int:
    """Return the most bytes held by the loss and its backward."""
    if step.num_compared:
        return _distance(hidden, step.num_compared)
    return _fused_loss(model, hidden) if step.fused_loss else _tiled_loss(model, hidden, step.autocast, storages)


def _distance(hidden: Tensor, num_compared: int) -> int:
    """Return the bytes of the teacher's and student's compared states if every token has a label, and, for one state at
    a time, of both and their difference in fp32.

    The teacher's forward keeps nothing else, and ends before the student's begins.
    """
    return hidden.numel() * (2 * hidden.itemsize * num_compared + 3 * 4)


def _tiled_loss(model: PreTrainedModel, hidden: Tensor, autocast: bool, storages: "Storages") -> int:
    """Return the tiled loss's most bytes, extrapolated from two and three tiles: from there on, they grow linearly."""
    head = model.get_output_embeddings()
    tile, num_tokens = max(1, MAX_LOGITS // head.weight.shape[0]), hidden.shape[0] * hidden.shape[1]

    def most(num_tokens: int) -> int:
        source = torch.empty(num_tokens, hidden.shape[-1], dtype=hidden.dtype, requires_grad=hidden.requires_grad)
        labels = torch.empty(num_tokens, dtype=torch.int64)
        before = storages.restart()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            valid = source.clone()  # selecting the valid tokens also copies
            total, _ = linear_cross_entropy(valid, head.weight, head.bias, labels, softcap=softcap(model))
        del valid
        if total.requires_grad:
            total.backward()
        return storages.peak - before

    if num_tokens <= 3 * tile:
        return most(num_tokens)
    two, three = most(2 * tile), most(3 * tile)
    return int(two + (three - two) * (num_tokens - 2 * tile) // tile)


def _fused_loss(model: PreTrainedModel, hidden: Tensor) -> int:
    """Return the bytes of Liger's loss: the gradient of the hidden states, and logits of about the same size.

    If the head trains, add its gradient, one tile's part of that sum in bf16 and in fp32, and the head in bf16.
    """
    weight = model.get_output_embeddings().weight
    vocab_size, hidden_size = weight.shape
    num_tokens = hidden.numel() // hidden_size
    tile = 2 ** ceil(log2(ceil(num_tokens / ceil(vocab_size / hidden_size))))
    head = weight.numel() * (weight.itemsize + 2 + 4 + 2) if weight.requires_grad else 0
    return int(num_tokens * hidden_size + tile * vocab_size) * hidden.itemsize + head


class Storages(TorchDispatchMode):
    """A dispatch mode that counts the bytes of all storages that operations return, until they are freed."""

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
        if storage._cdata not in self._known:  # a known storage belongs to a view
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, identity: int, num_bytes: int) -> None:
        self._known.discard(identity)
        self.live -= num_bytes

    def restart(self) -> int:
        """Return the live bytes, and count the peak anew from here."""
        self.peak = self.live
        return self.live


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _materialize(model: nn.Module) -> None:
    """Replace meta tensors by fake ones on the CPU, where autocast works. Tied tensors stay tied."""
    fakes: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor not in fakes:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                fakes[tensor] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
            setattr(module, name, fakes[tensor])
