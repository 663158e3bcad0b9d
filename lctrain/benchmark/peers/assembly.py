"""A peer of installed parts: transformers, PEFT, Liger, checkpointing, flash-attn-4, and FlexAttention on top of it."""

from functools import lru_cache
from typing import Any

import torch
from flash_attn.cute import flash_attn_func
from liger_kernel.transformers import apply_liger_kernel_to_llama
from peft import get_peft_model
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lctrain.benchmark.peers.whole_step import (
    Settings,
    adapters,
    answer,
    is_enough,
    random_model,
    settings,
    timed,
    tokens,
)

_flex = torch.compile(flex_attention, dynamic=False)


def full(module: Any, q: Any, k: Any, v: Any, mask: Any, **_: Any) -> tuple[Any, None]:
    """Return causal attention over the row."""
    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)[0], None


@lru_cache(maxsize=1)
def _s2_mask(heads: int, length: int) -> Any:
    group = length // 4

    def same_group(b: Any, h: Any, q: Any, k: Any) -> Any:
        shift = torch.where(h >= heads // 2, group // 2, 0)
        return (q >= k) & ((q + shift) // group == (k + shift) // group)

    return create_block_mask(same_group, None, heads, length, length, device="cuda", _compile=True)


def shifted_sparse(module: Any, q: Any, k: Any, v: Any, mask: Any, **_: Any) -> tuple[Any, None]:
    """Return S2's attention, computed with a mask."""
    block_mask = _s2_mask(q.shape[1], q.shape[2])
    out = _flex(q, k, v, block_mask=block_mask, enable_gqa=True, kernel_options={"BACKEND": "FLASH"})
    return out.transpose(1, 2), None


def train(given: Settings, model: Any, optimizer: Any, length: int) -> list[float]:
    """Return the seconds of the timed steps, after an untimed one at the same length that compiles masks."""
    rows = iter(tokens(given, length, given.num_steps + 1).cuda())

    def step() -> None:
        ids = next(rows)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    timed(step)
    times: list[float] = []
    while len(times) < given.num_steps and not is_enough(times, given.seconds):
        times.append(timed(step))
    return times


def main() -> None:
    """Measure the given length and print the answer."""
    given = settings()
    AttentionInterface.register("assembly", full if given.attention == "full" else shifted_sparse)
    AttentionMaskInterface.register("assembly", lambda *_, **__: None)
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=True, cross_entropy=False)
    model: Any = get_peft_model(random_model(given, "assembly"), adapters())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    answer(given.length, lambda: train(given, model, optimizer, given.length))


if __name__ == "__main__":
    main()
