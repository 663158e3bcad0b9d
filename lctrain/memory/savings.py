"""Choose the activations that a step keeps: the option group `memory`."""

from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedConfig, PreTrainedModel

from lctrain.errors import InputError
from lctrain.memory.host import Host
from lctrain.memory.inputs import LayerInputs
from lctrain.memory.tiled import TiledMLP

Count = int | Literal["all"]


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Options that save memory; a count of layers may be "all".

    Losses and gradients are the same with any option, except that `kv_heads_at_a_time` rounds differently in half
    precision, because heads are summed in parts.

    Recomputation follows Chen et al., arXiv:1604.06174: only a layer's input is kept, and its forward runs again in
    the backward. The backward visits the last layers first. So the last layers keep attention's output, and the first
    inputs, which are needed last, leave the device.
    """

    checkpoint_layers: Count  # so many first layers keep only their inputs; 0 recomputes nothing
    checkpoint_every: int  # k keeps each k-th of these inputs; those between are computed from it again
    save_attention: Count  # so many last checkpointed layers keep attention's output, and never compute it again
    offload: Count  # so many first kept inputs are moved to pinned host memory while the device computes
    mlp_tile: int  # tokens that a checkpointed layer's MLP computes at a time; 0 is all of them
    kv_heads_at_a_time: int  # key-value heads, with their query heads, that attention computes at a time; 0 is all

    def check(self, config: PreTrainedConfig, *, device_type: str, dropout: bool) -> None:
        """Raise InputError for an option that has no effect, or can't work, on such a model and device."""
        for name in ("checkpoint_layers", "save_attention", "offload", "mlp_tile", "kv_heads_at_a_time"):
            value: Count = getattr(self, name)
            if isinstance(value, int) and value < 0:
                raise InputError(f"memory.{name}={value} must be a number from 0 on")
        if self.checkpoint_every < 1:
            raise InputError(f"memory.checkpoint_every={self.checkpoint_every} must be at least 1")
        counts = self.resolve(config.num_hidden_layers)
        num_layers = int(counts.checkpoint_layers)
        if not num_layers and self != NOTHING:
            raise InputError("memory: without memory.checkpoint_layers there is nothing to save; use memory=none")
        if counts.checkpoint_every > num_layers > 0:
            raise InputError(f"memory.checkpoint_every={self.checkpoint_every} is more than the {num_layers} layers")
        if counts.offload and device_type != "cuda":
            raise InputError("memory.offload needs a CUDA device: the tensors are in the host's memory already")
        if counts.checkpoint_every > 1 and dropout:
            raise InputError("memory.checkpoint_every can't repeat dropout's draws; set it to 1 or dropout to 0")
        if self.kv_heads_at_a_time:
            self._check_heads(config.num_key_value_heads, dropout)

    def _check_heads(self, num_key_value_heads: int, dropout: bool) -> None:
        if num_key_value_heads % self.kv_heads_at_a_time:
            raise InputError(
                f"memory.kv_heads_at_a_time={self.kv_heads_at_a_time} does not divide the model's "
                f"{num_key_value_heads} key-value heads"
            )
        if dropout:
            raise InputError("memory.kv_heads_at_a_time can't share dropout's draws between heads; set dropout to 0")

    def resolve(self, num_layers: int) -> "Savings":
        """Return the same options with a number for "all", and with no count above the number that exists."""

        def within(count: Count, limit: int) -> int:
            return limit if count == "all" else min(count, limit)

        layers = within(self.checkpoint_layers, num_layers)
        inputs = -(-layers // max(1, self.checkpoint_every))
        attention, offload = within(self.save_attention, layers), within(self.offload, inputs)
        return replace(self, checkpoint_layers=layers, save_attention=attention, offload=offload)

    def apply(self, model: PreTrainedModel, host: Host) -> None:
        """Apply these options to a tuned `model`. Parameters keep their names."""
        layers = model.get_decoder().layers
        counts = self.resolve(len(layers))
        if not counts.checkpoint_layers:
            return
        num_checkpointed = int(counts.checkpoint_layers)
        inputs = LayerInputs(
            num_layers=num_checkpointed,
            every=counts.checkpoint_every,
            num_offloaded=int(counts.offload),
            num_attention=int(counts.save_attention),
            host=host,
        )
        _enable(model, inputs)
        for layer in layers[num_checkpointed:]:
            layer.gradient_checkpointing = False
        if counts.mlp_tile:
            for layer in layers[:num_checkpointed]:
                layer.mlp = TiledMLP(layer.mlp, counts.mlp_tile)

    def __str__(self) -> str:
        if not self.checkpoint_layers:
            return "nothing is recomputed"
        apart = f" from one input in {self.checkpoint_every}" if self.checkpoint_every > 1 else ""
        parts = [f"{self.checkpoint_layers} layers recomputed{apart}"]
        parts += [f"{self.save_attention} keep attention"] if self.save_attention else []
        parts += [f"{self.offload} inputs on the host"] if self.offload else []
        parts += [f"MLPs by {self.mlp_tile} tokens"] if self.mlp_tile else []
        heads = self.kv_heads_at_a_time
        parts += [f"attention by {heads} key-value head{'s' * (heads > 1)}"] if heads else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class AutoSavings:
    """A request for the cheapest savings that fit, by the plan of the run. Limits are in GiB; null is all memory."""

    device_memory: float | None
    host_memory: float | None


NOTHING = Savings(
    checkpoint_layers=0, checkpoint_every=1, save_attention=0, offload=0, mlp_tile=0, kv_heads_at_a_time=0
)


def _enable(model: PreTrainedModel, inputs: LayerInputs) -> None:
    settings = {"use_reentrant": False, "context_fn": inputs.context}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)
    inputs.attach(model.get_decoder())
