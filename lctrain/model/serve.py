"""Load a folder as a model that generates, together with the cache policy that belongs to it."""

from pathlib import Path
from typing import cast

import torch
from hydra.utils import instantiate
from transformers import PreTrainedModel

from lctrain.cache.base import CachePolicy
from lctrain.cache.duo import DuoCache
from lctrain.cache.full import FullCache
from lctrain.config import compose
from lctrain.heads import JSON, TSV, HeadPattern
from lctrain.model.recipe import PretrainedModel


def load(
    path: str | Path,
    *,
    cache: CachePolicy | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "auto",
    kernel: str = "auto",
) -> tuple[PreTrainedModel, CachePolicy]:
    """Return the model in `path` with lctrain's attention, and its cache policy.

    `model.generate(**inputs, past_key_values=policy.new(model))` runs the model.
    Without `cache`, a folder with a head pattern is served with DuoAttention's cache, any other with a full one.
    `path` is a folder in Hugging Face format or a hub id. Raises InputError before weights are read.
    """
    cfg = compose("evaluate")  # full attention, positions as the folder has them
    cfg.model.path, cfg.model.dtype, cfg.kernel = str(path), dtype, kernel
    recipe: PretrainedModel = instantiate(cfg.model, _convert_="all")
    policy = cache or _policy(Path(path))
    policy.check(recipe.config())
    recipe.check([1], torch.device(device).type)
    return cast(PreTrainedModel, recipe.build(device).eval()), policy


def _policy(folder: Path) -> CachePolicy:
    if (folder / JSON).is_file() or (folder / TSV).is_file():
        return DuoCache(pattern=HeadPattern.read(folder), positions="text")
    return FullCache()
