"""Load a folder as a model that generates, together with the cache policy that belongs to it."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from hydra.utils import instantiate
from transformers import PreTrainedModel

from lctrain.attention.base import Attention
from lctrain.attention.duo import DuoAttention
from lctrain.cache.base import CachePolicy
from lctrain.cache.duo import DuoCache
from lctrain.cache.full import FullCache
from lctrain.config import compose
from lctrain.errors import InputError
from lctrain.heads import JSON, TSV, HeadPattern
from lctrain.model.learned import method_of
from lctrain.model.recipe import PretrainedModel


def load(
    path: str | Path,
    *,
    attention: Attention | None = None,
    cache: CachePolicy | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    kernel: str = "auto",
) -> tuple[PreTrainedModel, CachePolicy]:
    """Return the model in `path` with its attention and its cache policy.

    `model.generate(**inputs, past_key_values=policy.new(model))` runs the model.
    Without `attention`, the model runs the method of its export, if that learned, or else full attention. Without
    `cache`, a folder with a head pattern is served with DuoAttention's cache and full attention, any other with a cache
    that keeps all.
    `path` is a folder in Hugging Face format or a hub id. Raises InputError before weights are read.
    """
    cfg = compose("evaluate")  # full attention, positions as the folder has them
    cfg.model.path, cfg.model.dtype, cfg.kernel = str(path), dtype, kernel
    recipe: PretrainedModel = instantiate(cfg.model, _convert_="all")
    policy = cache or _policy(Path(path))
    policy.check(recipe.config())
    method = attention or method_of(recipe.path, recipe.revision)
    if method is not None and not (policy.decides and isinstance(method, DuoAttention)):  # its pattern is the cache's
        if policy.decides:
            raise InputError(f"{type(policy).__name__} decides itself what heads see, instead of {method}")
        recipe = replace(recipe, attention=method)
    recipe.check([recipe.sequence_length], torch.device(device).type)
    return cast(PreTrainedModel, recipe.build(device).eval()), policy


def _policy(folder: Path) -> CachePolicy:
    if (folder / JSON).is_file() or (folder / TSV).is_file():
        return DuoCache(pattern=HeadPattern.read(folder), positions="text")
    return FullCache()
