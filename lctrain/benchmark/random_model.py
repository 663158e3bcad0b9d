"""A model of a published shape with random weights: the cost of a step does not depend on the weights' values."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lctrain.kernels.choose import choose
from lctrain.model.install import demand
from lctrain.model.recipe import ModelRecipe


@dataclass(frozen=True, kw_only=True)
class RandomModel(ModelRecipe):
    """A recipe with another's shape and settings, but random weights and no tokenizer; any tuning may train it."""

    published: PreTrainedConfig
    device: torch.device

    @classmethod
    def like(cls, recipe: ModelRecipe, device: torch.device, **changes: Any) -> "RandomModel":
        """Build it with the shape and every setting of `recipe`, except for `changes`."""
        settings = {field.name: getattr(recipe, field.name) for field in fields(ModelRecipe)} | changes
        return cls(published=recipe.base_config(), device=device, **settings)

    def base_config(self) -> PreTrainedConfig:
        return deepcopy(self.published)

    def load(self, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        with self.device:  # drawing 8B random numbers takes a second on a card, minutes on a CPU
            return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype))

    def check(self, lengths: Sequence[int], device_type: str = "cpu", sequence_parallel_size: int = 1) -> None:
        config = self.check_attention(lengths, sequence_parallel_size)
        choose(self.kernel, demand(config, self.torch_dtype(config), device_type))
        self._check_layers(config, device_type)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        raise NotImplementedError("random weights are never asked in words")
