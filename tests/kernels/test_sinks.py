"""How many sinks a program holds; what they compute is held to the reference in `test_local.py`."""

import pytest
import torch

from lctrain.kernels import sinks


@pytest.mark.parametrize(("head_dim", "most", "on_ada"), [(64, 256, 128), (128, 128, 64), (256, 64, 16)])
def test_fewer_sinks_fit_a_card_with_less_shared_memory(monkeypatch, head_dim, most, on_ada):
    for shared_memory, held in ((163 * 2**10, most), (99 * 2**10, on_ada)):
        monkeypatch.setattr(sinks, "shared_memory", lambda device, bound=shared_memory: bound)
        assert sinks.fits(held, head_dim, torch.device("cpu"))
        assert not sinks.fits(held + 1, head_dim, torch.device("cpu"))
