"""The methods of conf/attention at sizes where every pattern shows in 40 tokens, and a Llama that runs them.

A method's own test file declares `CASES`: name → (yaml, fields that shrink it, pattern written from the paper:
(layer, query head of 4, query position, key position, length) -> may attend). A method made of several patterns
declares a list of (weight, pattern) instead, where weight(module, query head) may depend on what the module learned.
"""

import runpy
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from lctrain.config import conf_dir
from lctrain.model.install import attention_modules, install

FILES = sorted(path for path in Path(__file__).parent.glob("test_*.py") if path.stem != "test_methods")
CASES = {name: case for path in FILES for name, case in runpy.run_path(str(path)).get("CASES", {}).items()}


@pytest.fixture(scope="session")
def method_of():
    """Attention methods by the names above, or by yaml with other fields."""

    def make(name, **changes):
        yaml, fields, _ = CASES.get(name, (name, {}, None))
        config = OmegaConf.to_container(OmegaConf.load(conf_dir() / "attention" / f"{yaml}.yaml"))
        return get_class(config.pop("_target_"))(**config | fields | changes)

    return make


@pytest.fixture(scope="session")
def attending(tiny, method_of):
    """A random Llama that attends by a method, on a kernel."""

    def make(name, kernel="sdpa", **changes):
        model = tiny("llama", **changes)
        method = method_of(name) if isinstance(name, str) else name
        install(model, method, kernel)
        set_learned(model, method)
        return model

    return make


def set_learned(model, method):
    """Gives what the method learned values that differ from layer to layer and head to head."""
    for layer, module in enumerate(attention_modules(model)):
        for learned in map(module.get_parameter, method.learned()):
            learned.data = torch.linspace(0.25, 0.75, learned.numel()) + 0.125 * layer
