"""Tunings: choices of the parameters that train."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lctrain.errors import InputError
from lctrain.losses.linear_part import linear_part
from lctrain.matmul.low_rank import add_low_rank


class Tuning(ABC):
    """A choice of what trains: it sets `requires_grad` of every parameter, and may wrap the model in PEFT's."""

    trains_all: ClassVar[bool] = False  # whether every parameter trains, so that all are loaded in fp32

    @abstractmethod
    def apply(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """Return the model to train."""


@dataclass(frozen=True, kw_only=True)
class Frozen(Tuning):
    """A tuning under which nothing trains, for models that are only evaluated."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        model.requires_grad_(False)
        return model


@dataclass(frozen=True, kw_only=True)
class FullTuning(Tuning):
    """A tuning under which every parameter trains."""

    trains_all: ClassVar[bool] = True

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        model.requires_grad_(True)
        return model


@dataclass(frozen=True, kw_only=True)
class ModuleTuning(Tuning):
    """A tuning under which parameters whose name contains one of `trainable` train; all others are frozen."""

    trainable: Sequence[str]

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        model.requires_grad_(False)
        unfreeze(model, self.trainable)
        return model


class LoRALinear(PeftLinear):
    """PEFT's LoRA layer, but with the low-rank term added in place, not by way of fp32 copies of the activations."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W x + scaling · B A x. PEFT computes it if adapters are merged, disabled, sharded or have dropout."""
        if args or kwargs or not self._adds_plainly():
            return super().forward(x, *args, **kwargs)
        return self._add(self.base_layer(x.flatten(0, -2)), x, slice(None), slice(None))

    def part(self, x: Tensor, outputs: slice, inputs: slice) -> Tensor:
        """Return the layer's product over slices of outputs and inputs, as `lctrain.losses.linear_part` does."""
        y_NO = linear_part(self.base_layer, x.flatten(0, -2), outputs=outputs, inputs=inputs)
        if self.disable_adapters or self.merged:
            return y_NO if x.ndim == 2 else y_NO.view(*x.shape[:-1], -1)
        if not self._adds_plainly():
            raise InputError("memory.kv_heads_at_a_time takes one adapter without dropout, on one device's weights")
        return self._add(y_NO, x, outputs, inputs)

    def _adds_plainly(self) -> bool:
        if len(self.active_adapters) != 1 or self.disable_adapters or self.merged:
            return False
        # ZeRO-3 gathers a parameter only for the forward of the module that owns it, which in-place addition skips.
        sharded = hasattr(self.lora_A[self.active_adapters[0]].weight, "ds_id")
        return not sharded and isinstance(self.lora_dropout[self.active_adapters[0]], nn.Identity)

    def _add(self, y_NO: Tensor, x: Tensor, outputs: slice, inputs: slice) -> Tensor:
        name = self.active_adapters[0]
        a_RI, b_OR = self.lora_A[name].weight, self.lora_B[name].weight
        added_NO = add_low_rank(y_NO, x.flatten(0, -2), a_RI[:, inputs], b_OR[outputs], self.scaling[name])  # type: ignore[index]
        return added_NO if x.ndim == 2 else added_NO.view(*x.shape[:-1], -1)


@dataclass(frozen=True, kw_only=True)
class LoRATuning(Tuning):
    """A tuning that trains PEFT's low-rank adapters (Hu et al., arXiv:2106.09685) and the parameters whose name
    contains one of `trainable`.

    LongLoRA (arXiv:2309.12307, §3.3) also trains the embeddings and norms: `trainable: [embed, norm]`.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: Sequence[str]
    trainable: Sequence[str]

    def apply(self, model: PreTrainedModel) -> PeftModel:
        names = [name for name, _ in model.named_modules()]
        missing = [target for target in self.target_modules if not any(name.split(".")[-1] == target for name in names)]
        if missing:
            raise InputError(f"tuning.target_modules: {type(model).__name__} has no module called {', '.join(missing)}")
        adapters = LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            target_modules=list(self.target_modules),
            task_type="CAUSAL_LM",
        )
        adapters._register_custom_module({nn.Linear: LoRALinear})  # PEFT's documented way to a layer of one's own
        with torch.device("cpu"):  # so that all strategies draw the same numbers; PEFT then moves the adapters
            tuned = get_peft_model(model, adapters)
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise InputError(
                "tuning.target_modules: the tiled loss knows no adapter on the output head; put it in tuning.trainable"
            )
        unfreeze(model, self.trainable)
        return tuned


def unfreeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Make parameters whose name contains one of `patterns` train; raise InputError for a pattern without match."""
    for pattern in patterns:
        matched = [p for name, p in model.named_parameters() if pattern in name and ".lora_" not in name]
        if not matched:
            raise InputError(f"tuning.trainable: no parameter name holds '{pattern}'")
        for parameter in matched:
            parameter.requires_grad_(True)


def keep_trained_in_fp32(model: nn.Module) -> None:
    """Cast the parameters that train to fp32: in bf16, a step of 2e-5 added to a weight of 0.02 is lost."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad or parameter.dtype == torch.float32:
                continue
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.float()
                continue
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):  # a shard can't change its dtype: make it anew
                whole = nn.Parameter(parameter.data.float())
            module.register_parameter(name, whole)


def num_elements(parameter: nn.Parameter) -> int:
    """Return the number of elements of the whole parameter, even where ZeRO-3 keeps only a shard of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
