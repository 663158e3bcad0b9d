"""Objectives: the losses that training minimises."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lctrain.errors import InputError
from lctrain.model.head import IGNORED, hidden_states, softcap, token_losses, unwrap
from lctrain.model.recipe import ModelRecipe

log = logging.getLogger(__name__)


class Objective(ABC):
    """A loss as sums over valid tokens, so that the mean of an optimizer step is exact however the step is divided."""

    is_perplexity: ClassVar[bool] = False  # whether exp(loss) is a perplexity

    def check(self, device: torch.device, recipe: ModelRecipe) -> None:  # noqa: B027 - most run anywhere
        """Raise InputError if the objective can't run on `device` or on the recipe's model."""

    def num_compared(self, num_layers: int) -> int:
        """Return how many of a teacher's states a step keeps; 0 without a teacher."""
        return 0

    @abstractmethod
    def __call__(self, model: PreTrainedModel | PeftModel, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the terms of the loss by name, each summed over the micro-batch's valid tokens in fp32. The loss is
        their sum.
        """


@dataclass(frozen=True, kw_only=True)
class CausalLM(Objective):
    """Next-token cross-entropy. `loss` is tiled (any device), liger (fused kernels, CUDA only) or auto (liger if it
    can run, else tiled).
    """

    loss: Literal["auto", "tiled", "liger"]

    is_perplexity: ClassVar[bool] = True

    def check(self, device: torch.device, recipe: ModelRecipe) -> None:
        if self.loss not in ("auto", "tiled", "liger"):
            raise InputError(f"objective.loss={self.loss} is none of auto, tiled, liger")
        if self.loss == "liger" and (device.type != "cuda" or find_spec("liger_kernel") is None):
            raise InputError("objective.loss=liger needs CUDA and liger-kernel (pip install 'lctrain[gpu]')")
        log.info("loss: %s linear cross-entropy", "Liger's" if self._uses_liger(device) else "tiled")

    def _uses_liger(self, device: torch.device) -> bool:
        auto = self.loss == "auto" and device.type == "cuda" and find_spec("liger_kernel") is not None
        return self.loss == "liger" or auto

    def __call__(self, model: PreTrainedModel | PeftModel, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        hidden_BLD = hidden_states(model, batch["input_ids"], batch["position_ids"])
        if self._uses_liger(hidden_BLD.device):
            return {"cross_entropy": _liger(model, hidden_BLD, batch["labels"])}
        return {"cross_entropy": token_losses(model, hidden_BLD, batch["labels"])[0]}


def _liger(model: PreTrainedModel | PeftModel, hidden_BLD: Tensor, labels_BL: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # needs triton

    head = unwrap(model).get_output_embeddings()
    fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum", softcap=softcap(model))
    return fused(head.weight, hidden_BLD.flatten(0, 1), labels_BL.flatten(), head.bias)  # type: ignore[no-any-return]
