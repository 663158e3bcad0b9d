"""Keys that were placed by a model's rotary embedding, moved, are what it gives at the other place."""

import sys

import pytest
import torch

from lctrain.cache.rotation import Rotation

MODELS = {
    "llama": {},
    "llama yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "qwen3": {},
    "stablelm": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("name", MODELS)
def test_moves_as_the_model_places(tiny, name):
    model = tiny(name.split()[0], **MODELS[name])
    apply = sys.modules[type(model).__module__].apply_rotary_pos_emb
    dims = 2 * model.model.rotary_emb.inv_freq.numel()
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))

    def placed(positions):
        cos, sin = model.model.rotary_emb(x, positions)
        return torch.cat((apply(x[..., :dims], x[..., :dims], cos, sin)[0], x[..., dims:]), dim=-1)

    start, by = torch.tensor([[3, 9, 4, 0, 7]]), torch.tensor([[0, 30, -4, 5, -2]])
    assert (dims < 8) == (name == "stablelm")
    torch.testing.assert_close(Rotation(model)(placed(start), by), placed(start + by), rtol=1e-5, atol=1e-5)
