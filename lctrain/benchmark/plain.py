"""A hand-written training loop: a transformers model with its own attention, cross-entropy, AdamW and clipping."""

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from lctrain.data.batch import Batch


def train(model: PreTrainedModel, steps: Sequence[Sequence[Batch]], *, lr: float, clip: float) -> tuple[float, float]:
    """Train on `steps`, each a list of micro-batches; return (median tokens/s over steps, loss of the first step)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    rates, losses = [], []
    model.train()
    for micro_batches in steps:
        start, total = time.perf_counter(), 0.0
        for batch in micro_batches:
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            summed = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum")
            loss = summed / batch["num_valid_tokens"]
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        rates.append(sum(batch["input_ids"].numel() for batch in micro_batches) / (time.perf_counter() - start))
    return median(rates), losses[0]
