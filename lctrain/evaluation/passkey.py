"""Passkey retrieval (Mohtashami & Jaggi, arXiv:2305.16300): a number hidden in held-out text, asked for at its end."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lctrain.data.passkey import passkey_prompt
from lctrain.errors import InputError
from lctrain.evaluation.base import Advance, Result, Task, Tokens


@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """Share of keys that greedy decoding through the KV cache recalls exactly, by length and depth.

    `depths` are the needle's places in the haystack, 0 its start and 1 its end. A length counts prompt and answer, so
    a model never reads past it. Each (length, depth) has `num_trials` keys of `num_digits` digits in random stretches
    of the documents; a trial depends on `seed` and its own cell alone, so adding cells changes no other.
    """

    generates: ClassVar[bool] = True

    depths: Sequence[float]
    num_trials: int
    num_digits: int
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depths or min(self.depths) < 0 or max(self.depths) > 1:
            raise InputError(f"passkey depths must be numbers from 0 to 1, not {list(self.depths)}")
        if self.num_trials < 1:
            raise InputError(f"passkey num_trials {self.num_trials} must be positive")
        if not 1 <= self.num_digits <= 18:
            raise InputError(f"passkey num_digits {self.num_digits} must lie in 1..18")

    def num_units_at(self, length: int) -> float:
        return length * len(self.depths) * self.num_trials

    def check(self, documents: Sequence[Tokens]) -> None:
        self.check_haystack(sum(map(len, documents)))

    def check_haystack(self, available: int) -> None:
        """Refuse fewer tokens than the longest prompt."""
        longest = self.context_lengths[-1]
        if available < longest:
            raise InputError(
                f"passkey at length {longest} hides its keys in held-out text of as many tokens, there are {available}:"
                " lower the evaluation's lengths or hold out more documents"
            )

    @torch.inference_mode()
    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        documents: Sequence[Tokens],
        advance: Advance,
    ) -> Result:
        haystack = np.concatenate([*documents])
        haystack = haystack[~np.isin(haystack, tokenizer.all_special_ids)].astype(
            np.int32
        )  # an end would close the context
        self.check_haystack(len(haystack))
        num_recalled = {
            length: {depth: self.cell(model, tokenizer, haystack, length, depth, advance) for depth in self.depths}
            for length in self.context_lengths
        }
        totals = {str(length): sum(row.values()) for length, row in num_recalled.items()}
        num_trials = len(self.depths) * self.num_trials
        return {
            "by_length": {length: total / num_trials for length, total in totals.items()},
            "interval": {length: wilson_interval(total, num_trials) for length, total in totals.items()},
            "by_depth": {
                str(length): {str(depth): recalled / self.num_trials for depth, recalled in row.items()}
                for length, row in num_recalled.items()
            },
            "num_trials": num_trials,
        }

    def cell(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        haystack: NDArray[np.int32],
        length: int,
        depth: float,
        advance: Advance,
    ) -> int:
        """How many of the trials at one length and depth are recalled."""
        trials = [self.trial(tokenizer, haystack, length, depth, i) for i in range(self.num_trials)]
        num_recalled = 0
        for i in range(0, len(trials), self.rows(length)):
            prompts, keys = zip(*trials[i : i + self.rows(length)], strict=True)
            replies = self.complete(model, tokenizer, prompts)
            num_recalled += sum(first_number(reply) == key for reply, key in zip(replies, keys, strict=True))
            advance(f"passkey at {length:,}, depth {depth:.0%}", length * len(prompts))
        return num_recalled

    def trial(
        self, tokenizer: PreTrainedTokenizerBase, haystack: NDArray[np.int32], length: int, depth: float, index: int
    ) -> tuple[NDArray[np.int64], str]:
        """One prompt, short of the length by the answer's room, and its key."""
        rng = np.random.default_rng([self.seed, length, round(depth * 10**6), index])
        start = rng.integers(len(haystack) - length + 1)
        return passkey_prompt(
            tokenizer,
            haystack[start : start + length],
            num_tokens=length - self.num_answer_tokens,
            depth=depth,
            num_digits=self.num_digits,
            rng=rng,
        )

    def complete(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[NDArray[np.int64]]
    ) -> list[str]:
        """The greedy continuations of prompts of one length."""
        input_ids = torch.from_numpy(np.stack(prompts)).to(model.device)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=self.num_answer_tokens, pad_token_id=tokenizer.pad_token_id or 0
        )
        mask = torch.ones_like(input_ids)
        output = cast(Any, model).generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
        return tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)

    @property
    def num_answer_tokens(self) -> int:
        """Room for a token per digit, a space in front and whatever ends the number."""
        return self.num_digits + 2


def first_number(reply: str) -> str | None:
    """The number a reply opens with."""
    match = re.match(r"\s*(\d+)", reply)
    return match and match[1]


def wilson_interval(num_hits: int, num_trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); honest for few trials and at 0 and 1, where the normal one is not."""
    share, spread = num_hits / num_trials, z * z / num_trials
    centre = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / num_trials + spread / (4 * num_trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
