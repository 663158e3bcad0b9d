"""The parts that all peers share: the model, LoRA's settings, the clock, and the format of the answer."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lctrain.benchmark.points import DOES_NOT_FIT

WARM_UP_LENGTH = 8192  # tokens of the untimed step


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one measurement of a peer."""

    architecture: dict[str, Any]  # a transformers config, model_type included
    attention: str  # full or shifted_sparse
    length: int
    num_steps: int  # timed steps at most, after an untimed one
    seconds: float  # after so many seconds, three timed steps are enough


def settings() -> Settings:
    """Return the settings from the command line."""
    return Settings(**json.loads(sys.argv[1]))


def random_model(given: Settings, attn_implementation: str) -> PreTrainedModel:
    """Build a model of the given shape with random weights in bf16 on the card."""
    config = AutoConfig.for_model(**given.architecture, use_cache=False)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(  # type: ignore[no-any-return]
            config, dtype=torch.bfloat16, attn_implementation=attn_implementation
        )


def adapters() -> LoraConfig:
    """Return LoRA's settings as in conf/tuning/lora.yaml."""
    return LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def tokens(given: Settings, length: int, num_rows: int) -> torch.Tensor:
    """Return random token ids [rows, length]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, given.architecture["vocab_size"], (num_rows, length), generator=generator)


def timed(step: Callable[[], None]) -> float:
    """Return the seconds of a step, the device's work included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def is_enough(times: Sequence[float], seconds: float) -> bool:
    """Return whether there are at least three timed steps and they have taken `seconds`."""
    return len(times) >= 3 and sum(times) >= seconds


def answer(length: int, run: Callable[[], list[float]]) -> None:
    """Print one line of JSON: the seconds that `run` returns and its peak memory, or that it ran out of memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        result: dict[str, Any] = {"seconds": run()}
    except torch.OutOfMemoryError:
        result = {"seconds": [], "error": DOES_NOT_FIT}
    result |= {"length": length, "device_memory": torch.cuda.max_memory_allocated() / 2**30}
    print("PEER " + json.dumps(result), flush=True)
