"""A small llama whose attention counts its runs, and what a training step of it gives."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from lctrain.memory.host import PinnedHost
from lctrain.memory.recall import attend_once
from lctrain.memory.savings import NOTHING, Savings

NUM_LAYERS = 5


class Outcome(NamedTuple):
    """Of one forward and backward; what the host was given in between."""

    loss: Tensor
    gradients: dict[str, Tensor]
    num_attentions: int
    num_mlp_tokens: list[int]  # of each call of a layer's up_proj
    num_hosted: int


class CountedHost(PinnedHost):
    """Counts the tensors it is given."""

    num_hosted = 0

    def put(self, tensor: Tensor) -> Any:
        self.num_hosted += 1
        return super().put(tensor)


@pytest.fixture
def step(tiny, ids) -> Callable[..., Outcome]:
    """step(savings) trains once on two rows of 40 tokens; the model is the same each time."""
    num_attentions = 0

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal num_attentions
        num_attentions += 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        return attend_once(run, q, k, v).transpose(1, 2), None

    AttentionInterface.register("counted", attend)
    model = tiny("llama", num_hidden_layers=NUM_LAYERS)
    model.set_attn_implementation("counted")

    def once(savings: Savings = NOTHING, prepare: Callable[[Any], Any] = lambda model: None) -> Outcome:
        nonlocal num_attentions
        trained, host, num_attentions = deepcopy(model).train(), CountedHost(), 0
        prepare(trained)
        savings.apply(trained, host)
        tokens: list[int] = []
        for layer in trained.model.layers:
            layer.mlp.up_proj.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
        hidden = trained.model(ids(2, 40), use_cache=False).last_hidden_state
        loss = (hidden * torch.arange(hidden.shape[-1])).square().mean()
        loss.backward()
        gradients = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
        return Outcome(loss.detach(), gradients, num_attentions, tokens, host.num_hosted)

    return once
