"""A peer with TRL's SFTTrainer: LoRA, gradient checkpointing, its chunked loss, SDPA; S2 as LongLoRA publishes it.

Activations are offloaded past `OFFLOAD_FROM` tokens, and always with S2, whose keys and values are repeated.
"""

from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedTokenizerFast, TrainerCallback
from transformers.masking_utils import AttentionMaskInterface
from trl import SFTConfig, SFTTrainer

from lctrain.benchmark.peers.whole_step import (
    WARM_UP_LENGTH,
    Settings,
    adapters,
    answer,
    is_enough,
    random_model,
    settings,
    tokens,
)

OFFLOAD_FROM = 100_000  # tokens


def published_s2(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Return S2's attention with groups of a quarter row as rows of a batch, half of the heads rolled by half a group.

    Keys and values are repeated for each query head.
    """
    repeats, group = q.shape[1] // k.shape[1], q.shape[2] // 4

    def roll(x: Tensor, by: int) -> Tensor:
        still, moved = x.chunk(2, dim=1)
        return torch.cat([still, moved.roll(by, dims=2)], dim=1)

    def fold(x: Tensor) -> Tensor:
        groups: Tensor = roll(x, -group // 2).unflatten(2, (4, group))
        return groups.transpose(1, 2).flatten(0, 1)

    q, k, v = fold(q), fold(k.repeat_interleave(repeats, 1)), fold(v.repeat_interleave(repeats, 1))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        folded = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    out: Tensor = folded.unflatten(0, (-1, 4)).transpose(1, 2).flatten(2, 3)
    return roll(out, group // 2).transpose(1, 2).contiguous(), None


class _Clock(TrainerCallback):
    def __init__(self, budget: float) -> None:
        self.times: list[float] = []
        self._budget = budget
        self._events: list[Any] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._mark()
        begin, end = self._events[-2:]
        end.synchronize()
        self.times.append(begin.elapsed_time(end) / 1000)
        control.should_training_stop |= is_enough(self.times, self._budget)

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)


def train(given: Settings, model: Any, length: int, num_rows: int) -> list[float]:
    """Return the seconds of each step."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    arguments = SFTConfig(
        output_dir="/tmp/lctrain-trl",
        per_device_train_batch_size=1,
        max_steps=num_rows,
        bf16=True,
        gradient_checkpointing=True,
        activation_offloading=given.attention != "full" or length > OFFLOAD_FROM,
        max_length=None,
        report_to=[],
        save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    clock = _Clock(given.seconds)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": tokens(given, length, num_rows).tolist()}),
        callbacks=[clock],
        peft_config=None if hasattr(model, "peft_config") else adapters(),
    )
    trainer.train()
    return clock.times


def main() -> None:
    """Measure the given length and print the answer."""
    AttentionInterface.register("published_s2", published_s2)
    AttentionMaskInterface.register("published_s2", lambda *_, **__: None)
    given = settings()
    model = random_model(given, "sdpa" if given.attention == "full" else "published_s2")
    train(given, model, min(given.length, WARM_UP_LENGTH), 1)
    answer(given.length, lambda: train(given, model, given.length, given.num_steps))


if __name__ == "__main__":
    main()
