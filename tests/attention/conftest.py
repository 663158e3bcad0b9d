"""The methods of conf/attention at sizes where every pattern shows in 40 tokens, and a Llama that runs them."""

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from lctrain.config import conf_dir
from lctrain.model.install import install

# What a test's name means: the yaml, and the fields that shrink it.
METHODS = {
    "full": ("full", {}),
    "window": ("sliding_window", {"sliding_window": 5}),
    "window per layer": ("sliding_window", {"sliding_window": [3, 7]}),
    "streaming": ("streaming", {"num_sink_tokens": 2, "recent_size": 4}),
    "s2 size": ("shifted_sparse", {"group_size_ratio": None, "group_size": 8}),
    "s2 ratio": ("shifted_sparse", {"group_size_ratio": 0.25}),
}


@pytest.fixture(scope="session")
def method_of():
    """Attention methods by the names above, or by yaml with other fields."""

    def make(name, **changes):
        yaml, fields = METHODS.get(name, (name, {}))
        config = OmegaConf.to_container(OmegaConf.load(conf_dir() / "attention" / f"{yaml}.yaml"))
        return get_class(config.pop("_target_"))(**config | fields | changes)

    return make


@pytest.fixture(scope="session")
def attending(tiny, method_of):
    """A random Llama that attends by a method, on a kernel."""

    def make(name, kernel="sdpa", **changes):
        model = tiny("llama", **changes)
        install(model, method_of(name) if isinstance(name, str) else name, kernel)
        return model

    return make
