"""Load a folder as a model that generates, together with the cache policy that belongs to it."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from hydra.utils import instantiate
from transformers import PreTrainedModel

from lctrain.attention.base import Attention
from lctrain.cache.base import CachePolicy
from lctrain.cache.duo import DuoCache
from lctrain.cache.full import FullCache
from lctrain.config import compose
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
    Without `attention`, the model runs what it learned, or else full attention. Without `cache`, a folder with a head
    pattern is served with DuoAttention's cache and full attention, any other with a cache that keeps all.
    `path` is a folder in Hugging Face format or a hub id. Raises InputError before weights are read.
    """
    cfg = compose("evaluate")  # full attention, positions as the folder has them
    cfg.model.path, cfg.model.dtype, cfg.kernel = str(path), dtype, kernel
    recipe: PretrainedModel = instantiate(cfg.model, _convert_="all")
    policy = cache or _policy(Path(path))
    method = attention or (None if policy.decides else method_of(Path(path)))
    if method is not None:
        recipe = replace(recipe, attention=method)
    policy.check(recipe.config())
    recipe.check([recipe.sequence_length], torch.device(device).type)
    return cast(PreTrainedModel, recipe.build(device).eval()), policy


def _policy(folder: Path) -> CachePolicy:
    if (folder / JSON).is_file() or (folder / TSV).is_file():
        return DuoCache(pattern=HeadPattern.read(folder), positions="text")
    return FullCache()
