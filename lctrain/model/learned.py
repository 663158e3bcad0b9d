"""Keep what an attention method learned beside an exported model, and give it back to a model that is loaded."""

from pathlib import Path
from typing import cast

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lctrain.attention.base import Attention
from lctrain.errors import InputError
from lctrain.model.install import attention_modules

WEIGHTS = "method.safetensors"  # the parameters of all child modules, under their names in the model
METHOD = "method.yaml"  # the method's config, as conf/attention has it
HOME = "lctrain.attention."  # where classes of methods are; a folder from elsewhere may name no other


def take(model: PreTrainedModel, method: Attention) -> dict[str, Tensor]:
    """Remove the method's child modules from `model`, which plain transformers then knows, and return their values."""
    values = {name: p.detach().cpu() for name, p in model.named_parameters() if method.owns(name)}
    for module in attention_modules(model) if method.learns else []:
        if hasattr(module, method.name):
            delattr(module, method.name)
    return values


def write(folder: Path, values: dict[str, Tensor], method: DictConfig) -> None:
    """Write the values and the config of a method into an exported folder."""
    save_file(values, folder / WEIGHTS)
    OmegaConf.save(method, folder / METHOD, resolve=True)


def method_of(folder: Path) -> Attention | None:
    """Return the method that a folder was exported with, if it learned anything; else None.

    Raises InputError if its class is not one of lctrain's: a folder from elsewhere must not choose what runs here.
    """
    if (config := _config(folder)) is None:
        return None
    if not str(config._target_).startswith(HOME):
        raise InputError(f"{folder / METHOD}: _target_ {config._target_} is no class of {HOME}; name the method")
    return cast(Attention, instantiate(config, _convert_="all"))


def values_for(method: Attention, folder: Path) -> dict[str, Tensor]:
    """Return what `method` learned in the model of `folder`; nothing where that was exported with another class.

    Raises InputError if it was the same class with other settings.
    """
    config, own = _config(folder), type(method)
    if config is None or config._target_ != f"{own.__module__}.{own.__qualname__}":
        return {}
    if (exported := instantiate(config, _convert_="all")) != method:
        raise InputError(f"{folder} learned {exported}, not {method}; give the same settings")
    return load_file(folder / WEIGHTS)


def _config(folder: Path) -> DictConfig | None:
    return cast(DictConfig, OmegaConf.load(folder / METHOD)) if (folder / METHOD).is_file() else None


def fill(model: PreTrainedModel, method: Attention, values: dict[str, Tensor]) -> None:
    """Set the parameters of the method's child modules. Raises InputError if they are others."""
    own = {name: parameter for name, parameter in model.named_parameters() if method.owns(name)}
    if differ := sorted(own.keys() ^ values.keys()):
        raise InputError(f"{WEIGHTS} belongs to another model: {len(differ)} parameters differ, e.g. {differ[0]}")
    for name, parameter in own.items():
        parameter.data.copy_(values[name])
