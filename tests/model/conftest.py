"""Recipes over the saved tiny models, with the fields of conf/model/pretrained.yaml."""

import pytest

from lctrain.attention.full import FullAttention
from lctrain.memory.savings import NOTHING
from lctrain.model.recipe import PretrainedModel
from lctrain.model.tuning import FullTuning
from lctrain.rope.none import NoScaling


@pytest.fixture
def recipe(saved):
    """recipe("llama", attention=…), or of a folder."""

    def make(model, *, shape=None, **changes):
        settings = {
            "path": str(saved(model, **shape or {}) if isinstance(model, str) else model), "revision": "main",
            "use_safetensors": True, "trust_remote_code": False, "architecture": None, "dtype": "auto",
            "memory": NOTHING, "attention": FullAttention(), "rope": NoScaling(), "tuning": FullTuning(),
            "sequence_length": 64, "kernel": "auto", "layer_kernel": "auto", "precision": None,
        }  # fmt: skip
        return PretrainedModel(**settings | changes)

    return make
