"""Keep the inputs of checkpointed layers on the device or on the host, or compute them again."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lctrain.memory.host import Host
from lctrain.memory.recall import AttentionCall, recording, replaying


class LayerInputs:
    """The rules for what each checkpointed layer of a decoder keeps between forward and backward.

    `context` is the `context_fn` of `torch.utils.checkpoint`, which calls it when a layer begins, right before it
    saves the layer's input. That one tensor passes through saved-tensor hooks that are open during the decoder's
    forward.
    """

    def __init__(self, *, num_layers: int, every: int, num_offloaded: int, num_attention: int, host: Host) -> None:
        self.every, self.num_offloaded, self.host = every, num_offloaded, host
        self.first_attention = num_layers - num_attention
        self._pass: _Pass | None = None
        self._hooks: saved_tensors_hooks | None = None

    def attach(self, decoder: nn.Module) -> None:
        """Register hooks that apply these rules in every training forward of `decoder`."""
        layers: Any = decoder.layers
        self._layers = layers
        decoder.register_forward_pre_hook(self._begin)
        decoder.register_forward_hook(self._end, always_call=True)
        if self.every > 1:
            for index, layer in enumerate(layers):
                layer.register_forward_pre_hook(self._remember(index), with_kwargs=True)

    def context(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return the context managers for a layer's forward and for its recomputation."""
        if self._pass is None or not torch.is_grad_enabled():
            return nullcontext(), nullcontext()
        calls: list[AttentionCall] = []
        return recording(calls, keep=self._pass.begin_layer() >= self.first_attention), replaying(calls)

    def _begin(self, decoder: nn.Module, _: Any) -> None:
        if decoder.training and torch.is_grad_enabled():
            self._pass = _Pass(self, self._layers)
            self._hooks = saved_tensors_hooks(self._pass.pack, self._pass.unpack)
            self._hooks.__enter__()

    def _end(self, *_: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
        self._pass = self._hooks = None

    def _remember(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if self._pass is not None:
                self._pass.calls[index] = args[1:], kwargs

        return hook


class _Pass:
    """The kept inputs of one forward, for its backward."""

    def __init__(self, inputs: LayerInputs, layers: Any) -> None:
        self._plan, self._layers = inputs, layers
        self.calls: dict[int, tuple[tuple[Any, ...], Mapping[str, Any]]] = {}  # layer index → its other arguments
        self._kept: dict[int, Any] = {}  # layer index → its input, or the host's handle of it
        self._begun = -1
        self._awaited: int | None = None  # the layer whose input is saved next
        self._autocast: tuple[str, torch.dtype, bool] | None = None

    def begin_layer(self) -> int:
        self._begun = self._awaited = self._begun + 1
        return self._begun

    def pack(self, tensor: Tensor) -> Any:
        """Keep a layer's input and return the layer's index; return any other saved tensor unchanged."""
        index = self._awaited
        if index is None or tensor.ndim < 3 or not tensor.is_floating_point():
            return tensor
        self._awaited = None
        if self._autocast is None:
            device = tensor.device.type
            self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        if index % self._plan.every == 0:
            offloaded = index // self._plan.every < self._plan.num_offloaded
            self._kept[index] = self._plan.host.put(tensor) if offloaded else tensor
        return index

    def unpack(self, packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else self._input(packed)

    def _input(self, index: int) -> Tensor:
        """Return a layer's input, and begin to fetch the offloaded input that the backward needs next."""
        first = index - index % self._plan.every
        if index not in self._kept:
            self._run(first, index)
        tensor = self._take(index)
        if self._is_offloaded(first - self._plan.every):
            self._plan.host.fetch(self._kept[first - self._plan.every])
        return tensor

    def _run(self, first: int, last: int) -> None:
        """Compute the inputs of the layers after `first` up to `last`, from the kept input of layer `first`."""
        hidden = self._kept[first] = self._take(first)
        assert self._autocast is not None
        device, dtype, enabled = self._autocast
        with torch.no_grad(), torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
            for index in range(first, last):
                args, kwargs = self.calls[index]
                output = self._layers[index](hidden, *args, **kwargs)
                hidden = self._kept[index + 1] = output if isinstance(output, Tensor) else output[0]

    def _take(self, index: int) -> Tensor:
        kept = self._kept.pop(index)
        return kept if isinstance(kept, Tensor) else self._plan.host.take(kept)

    def _is_offloaded(self, index: int) -> bool:
        return index in self._kept and not isinstance(self._kept[index], Tensor)
