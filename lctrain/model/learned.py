"""Keep what an attention method learned beside an exported model, and give it back to a model that is loaded."""

import re
from pathlib import Path
from typing import Any, cast

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lctrain.attention.base import Attention
from lctrain.errors import InputError
from lctrain.model.install import attention_modules

WEIGHTS = "method.safetensors"  # the parameters of all child modules, under their names in the model
METHOD = "method.yaml"  # the method's config, as conf/attention has it
OURS = re.compile(r"lctrain\.attention\.\w+\.\w+")  # the classes that a folder from elsewhere may name


def take(model: PreTrainedModel, method: Attention) -> dict[str, Tensor]:
    """Remove the method's child modules from `model`, and return the values of their parameters.

    Plain transformers knows the model that is left.
    """
    values = {name: p.detach().cpu() for name, p in model.named_parameters() if method.owns(name)}
    for module in attention_modules(model) if method.learns else []:
        if hasattr(module, method.name):
            delattr(module, method.name)
    return values


def write(folder: Path, values: dict[str, Tensor], method: DictConfig) -> None:
    """Write the values and the config of a method into an exported folder."""
    save_file(values, folder / WEIGHTS)
    OmegaConf.save(method, folder / METHOD, resolve=True)


def method_of(path: str, revision: str = "main") -> Attention | None:
    """Return the method that a folder or hub id was exported with, if it learned anything; else None.

    Raises InputError if its class is not one of lctrain's: a folder from elsewhere must not choose what runs here.
    """
    if (config := _config(path, revision)) is None:
        return None
    target = str(config.pop("_target_"))
    if not OURS.fullmatch(target) or not issubclass(found := get_class(target), Attention):
        raise InputError(
            f"{path}/{METHOD}: _target_ {target} is no class of lctrain.attention; give the method by name"
        )
    return found(**config)


def values_for(method: Attention, path: str, revision: str = "main") -> dict[str, Tensor]:
    """Return what `method` learned in the model of a folder or hub id; nothing where another class was exported.

    Raises InputError if it was the same class with other settings.
    """
    config, own = _config(path, revision), type(method)
    if config is None or config.pop("_target_") != f"{own.__module__}.{own.__qualname__}":
        return {}
    if (exported := own(**config)) != method:
        raise InputError(f"{path} learned {exported}, not {method}; give the same settings")
    return load_file(_file(path, revision, WEIGHTS) or WEIGHTS)


def fill(model: PreTrainedModel, method: Attention, values: dict[str, Tensor]) -> None:
    """Set the parameters of the method's child modules. Raises InputError if they are others."""
    own = {name: parameter for name, parameter in model.named_parameters() if method.owns(name)}
    if differ := sorted(own.keys() ^ values.keys()):
        raise InputError(f"{WEIGHTS} belongs to another model: {len(differ)} parameters differ, e.g. {differ[0]}")
    for name, parameter in own.items():
        parameter.data.copy_(values[name])


def _config(path: str, revision: str) -> dict[str, Any] | None:
    """Return the fields of an exported method as plain values, of which none is built."""
    file = _file(path, revision, METHOD)
    return None if file is None else cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file)))


def _file(path: str, revision: str, name: str) -> Path | None:
    """Return a file of a local folder, or of a hub model once it is downloaded; None where there is none."""
    if (folder := Path(path)).exists():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(path, name, revision=revision))
    except (EntryNotFoundError, HFValidationError):  # also where the hub can't be reached and its cache has none
        return None
