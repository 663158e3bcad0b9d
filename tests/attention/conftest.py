"""The methods of conf/attention at sizes where every pattern shows in 40 tokens, and a Llama that runs them.

A method's own test file declares `CASES`: name → (yaml, fields that shrink it, pattern written from the paper:
(layer, query head of 4, query position, key position, length) -> may attend). A method made of several patterns
declares a list of (weight, pattern) instead, where weight(module, query head) may depend on what the module learned.
Any other method declares {"attend": function}, which computes (module, q, k, v, scaling) -> [B, H, L, D] of rows of one
document, token by token. Names in `DEPENDS_ON_LENGTH` are of cases whose pattern depends on the row's length.
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
DECLARED = [runpy.run_path(str(path)) for path in FILES]
CASES = {name: case for file in DECLARED for name, case in file.get("CASES", {}).items()}
FIXED = [name for name in CASES if not any(name in file.get("DEPENDS_ON_LENGTH", ()) for file in DECLARED)]


def method(name, **changes):
    """An attention method by a name above, or by its yaml, with other fields."""
    yaml, fields, _ = CASES.get(name, (name, {}, None))
    config = OmegaConf.to_container(OmegaConf.load(conf_dir() / "attention" / f"{yaml}.yaml"))
    return get_class(config.pop("_target_"))(**config | fields | changes)


@pytest.fixture(scope="session")
def method_of():
    return method


@pytest.fixture(scope="session")
def attending(tiny, method_of):
    """A random Llama that attends by a method, on a kernel."""

    def make(name, kernel="sdpa", **changes):
        model = tiny("llama", **changes)
        chosen = method_of(name) if isinstance(name, str) else name
        install(model, chosen, kernel)
        set_learned(model, chosen)
        return model

    return make


def set_learned(model, method):
    """Gives what the method learned values that differ from layer to layer and head to head."""
    for layer, module in enumerate(attention_modules(model)):
        for learned in getattr(module, method.name, torch.nn.Module()).parameters():
            learned.data = (torch.linspace(0.25, 0.75, learned.numel()) + 0.125 * layer).view_as(learned)
