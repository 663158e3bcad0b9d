"""Estimate how long a step takes: operations over the rates at which they were measured to run."""

from dataclasses import dataclass

from torch import nn

from lctrain.matmul.fp8 import FP8Linear
from lctrain.memory.savings import Savings
from lctrain.plan.cards import Card

# Shares of the datasheet's dense bf16 rate. From a profile of 32k tokens (docs/results/step.md):
MATRIX = 0.67  # matrix products
# Fitted, given MATRIX, to twelve steps of an 8B Llama on one H200, from 32k to a million tokens (docs/results/plan.md):
FP8 = 1.08  # matrix products in fp8, the scaling of their inputs included
ATTENTION = 0.625  # flash-attn-4, forward and backward
BACKWARD = 2.5  # FLOPs of attention's backward, in multiples of its forward's
# In each layer, norms, gates, residuals and LoRA move a token's hidden and intermediate state MOVED times, at the share
# BANDWIDTH of the datasheet's rate; a third of that again for each forward that runs again.
MOVED, BANDWIDTH = 39, 0.9


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one token: FLOPs by the kind of operation, and bytes moved; recomputation is counted."""

    matrix: float
    fp8: float
    attention: float
    moved: float  # bytes

    def seconds(self, card: Card) -> float:
        """Return how many seconds `card` computes."""
        products = self.matrix / MATRIX + self.fp8 / FP8 + self.attention / ATTENTION
        return products / card.flops + self.moved / (BANDWIDTH * card.bandwidth)


def work(model: nn.Module, attention: float, savings: Savings, fp8: bool, taught: float = 0.0) -> Work:
    """Return the work of a token in a tuned model with these savings.

    `attention` is the FLOPs of attention's forward, and `taught` that of a teacher's, which runs another forward.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    counts = savings.resolve(config.num_hidden_layers)
    share = int(counts.checkpoint_layers) / config.num_hidden_layers
    again = share * (1 - 1 / counts.checkpoint_every)  # forwards that recompute inputs which were not kept
    frozen = trained = head = projections = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | FP8Linear) and "lora_" not in name:
            size = module.in_features * module.out_features
            projections += size * ("self_attn" in name)
            if "lm_head" in name:
                head += size
            elif isinstance(module, nn.Linear) and module.weight.requires_grad:
                trained += size
            else:
                frozen += size
    last = config.hidden_size * config.intermediate_size * config.num_hidden_layers  # its output is not recomputed
    passes = 2 + again
    layers = 2 * (passes * (frozen + trained) + share * (frozen + trained - last))
    if counts.kv_heads_at_a_time:
        layers += 2 * share * projections
    if taught:
        layers, head = layers + 2 * (frozen + trained), 0
    unsaved = share - int(counts.save_attention) / config.num_hidden_layers
    width = config.hidden_size + config.intermediate_size
    return Work(
        matrix=2 * trained + 4 * head + (0 if fp8 else layers),
        fp8=layers if fp8 else 0,
        attention=attention * (1 + BACKWARD + unsaved + again) + taught,
        moved=2 * MOVED * width * config.num_hidden_layers * (1 + (share + again + bool(taught)) / 3),
    )
