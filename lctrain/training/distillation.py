"""Distillation: train a model with a cheaper attention to reproduce the same model's full attention."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lctrain.attention.duo import DuoAttention
from lctrain.errors import InputError
from lctrain.losses.linear_kl import linear_kl
from lctrain.model.head import IGNORED, hidden_states, softcap, unwrap
from lctrain.model.install import attention_modules
from lctrain.model.recipe import ModelRecipe
from lctrain.model.teacher import check_teacher, teaching
from lctrain.training.gates import gates_of
from lctrain.training.objective import Objective

CHOICES = {"loss": ("hidden_state", "attention_output", "logit_kl"), "layers": ("last", "all")}


@dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
    """The distance from the student (any attention) to the teacher (the same model, full attention, no adapters),
    plus λ·Σ|α| over the gates.

    The distance is taken at tokens with a label, which are only the answers where a corpus marks them. `loss` is
    `hidden_state` or `attention_output` (after the output projection): the squared difference, averaged over the hidden
    size, as in DuoAttention (arXiv:2410.10819, eq. 2; the paper sums, the authors' code averages); or `logit_kl`:
    KL(teacher ‖ student) of the next token, in nats. `layers` is `last`: the last hidden states after the final norm,
    or the last layer's attention; or `all`: the mean over every layer's output or attention.

    `gate_weight` is λ of eq. 3, for attention=duo. `gate_reduction` is `sum`, as in the paper, or `mean`, which makes λ
    independent of the number of gates. The gate term is added once per step, however the step is divided.
    """

    loss: Literal["hidden_state", "attention_output", "logit_kl"]
    layers: Literal["last", "all"]
    gate_weight: float
    gate_reduction: Literal["sum", "mean"]

    def check(self, device: torch.device, recipe: ModelRecipe) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"objective.{name}={getattr(self, name)} is none of {', '.join(choices)}")
        if self.loss == "logit_kl" and self.layers == "all":
            raise InputError("objective.loss=logit_kl compares what the last layer leads to; use objective.layers=last")
        if self.gate_reduction not in ("sum", "mean"):
            raise InputError(f"objective.gate_reduction={self.gate_reduction} is neither sum nor mean")
        if not 0 <= self.gate_weight < inf:
            raise InputError(f"objective.gate_weight={self.gate_weight} must be a number that is not negative")
        if self.gate_weight and not isinstance(recipe.attention, DuoAttention):
            raise InputError(
                f"objective.gate_weight={self.gate_weight} weighs the gates of attention=duo, and "
                f"{type(recipe.attention).__name__} has none; set it to 0"
            )
        check_teacher(recipe)

    def num_compared(self, num_layers: int) -> int:
        return num_layers if self.layers == "all" else 1

    def __call__(self, model: PreTrainedModel | PeftModel, batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
        valid_BL = batch["labels"] != IGNORED
        with teaching(model):  # before the student: the backward expects the student's forward to be the latest
            taught = self._states(model, batch, valid_BL)
        learned = self._states(model, batch, valid_BL)
        return {self.loss: self.distance(model, learned, taught), **self.gate_term(model, valid_BL)}

    def _states(self, model: PreTrainedModel | PeftModel, batch: Mapping[str, Any], valid_BL: Tensor) -> list[Tensor]:
        """Run the model and return the states to compare, [N, D] for each compared layer."""
        with outputs_of(self._observed(unwrap(model)), valid_BL) as outputs:
            last = hidden_states(model, batch["input_ids"], batch["position_ids"])
        return [x if x.ndim == 2 else x[valid_BL] for x in outputs or [last]]

    def _observed(self, model: PreTrainedModel) -> Sequence[nn.Module]:
        """Return the modules whose outputs are compared; none means the model's last hidden states."""
        if self.loss == "attention_output":
            modules = attention_modules(model)
            return modules if self.layers == "all" else modules[-1:]
        return list(model.get_decoder().layers) if self.layers == "all" else []

    def distance(self, model: PreTrainedModel | PeftModel, learned: list[Tensor], taught: list[Tensor]) -> Tensor:
        """Return the distance between the student's and the teacher's states, [N, D] per layer, summed over tokens."""
        if self.loss == "logit_kl":
            head = unwrap(model).get_output_embeddings()
            return linear_kl(learned[0], taught[0], head.weight, head.bias, softcap=softcap(model))
        squares = [(a.float() - b.float()).square().mean(-1).sum() for a, b in zip(learned, taught, strict=True)]
        return torch.stack(squares).mean()

    def gate_term(self, model: PreTrainedModel | PeftModel, valid_BL: Tensor) -> dict[str, Tensor]:
        """Return λ·Σ|α| times the number of valid tokens, so that the mean over a step's tokens holds it once."""
        if not self.gate_weight:
            return {}
        gates = torch.cat([gate_K.abs() for gate_K in gates_of(model)])
        magnitude = gates.sum() if self.gate_reduction == "sum" else gates.mean()
        return {"gates": self.gate_weight * magnitude * valid_BL.sum()}


@contextmanager
def outputs_of(modules: Sequence[nn.Module], valid_BL: Tensor) -> Iterator[list[Tensor]]:
    """Yield a list that collects each module's output: [B, L, D], or [N, D] at the valid tokens if gradients are off.

    With gradients on, nothing is computed here, because a layer that is recomputed in the backward runs without these
    hooks and must do the same operations.
    """
    outputs: list[Tensor] = []

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        x_BLD = output if isinstance(output, Tensor) else output[0]
        outputs.append(x_BLD if torch.is_grad_enabled() else x_BLD[valid_BL])

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
