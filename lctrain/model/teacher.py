"""A model as its own teacher: full attention and no adapters, on the same weights."""

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
    """Inside, `model` computes what it would without what trains, in full attention on its kernel, and no gradients."""
    adapters = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    with torch.no_grad(), full_attention(unwrap(model)), adapters:
        yield


def check_teacher(recipe: ModelRecipe) -> None:
    """InputError unless what trains are adapters and what the attention brought: all else is the teacher's too."""
    if isinstance(recipe.attention, FullAttention):
        raise InputError("attention=full is the teacher of distillation and can't be the student; choose another")
    trained = [name for name, p in recipe.skeleton(recipe.config()).named_parameters() if p.requires_grad]
    own = [n for n in trained if ".lora_" not in n and n.rpartition(".")[2] not in recipe.attention.learned()]
    if own:
        raise InputError(
            f"distillation needs a teacher that stays as it is, and this tuning trains {len(own)} of the model's own "
            f"parameters ({own[0]}, …); use tuning=gates or tuning=lora"
        )
