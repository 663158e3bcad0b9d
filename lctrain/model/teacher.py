"""Use a model as its own teacher: the same weights, with full attention and without adapters."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lctrain.attention.full import FullAttention
from lctrain.errors import InputError
from lctrain.model.head import unwrap
from lctrain.model.install import full_attention
from lctrain.model.recipe import ModelRecipe


@contextmanager
def teaching(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Make `model` compute as the teacher in this context: full attention, no adapters, no gradients, same kernel."""
    adapters = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    with torch.no_grad(), full_attention(unwrap(model)), adapters:
        yield


def check_teacher(recipe: ModelRecipe) -> None:
    """Raise InputError unless only adapters and the attention's own parameters train: the teacher shares the others."""
    if isinstance(recipe.attention, FullAttention):
        raise InputError("attention=full is the teacher of distillation and can't be the student; choose another")
    trained = [name for name, p in recipe.skeleton(recipe.config()).named_parameters() if p.requires_grad]
    own = [name for name in trained if ".lora_" not in name and not recipe.attention.owns(name)]
    if own:
        raise InputError(
            f"distillation needs a teacher that stays as it is, and this tuning trains {len(own)} of the model's own "
            f"parameters ({own[0]}, …); use tuning=method, tuning=gates or tuning=lora"
        )
