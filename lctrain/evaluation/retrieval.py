"""The base class of recall tasks: recall of a fact hidden in other text, by context length and depth of the fact."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lctrain.data.needle import HiddenFact
from lctrain.errors import InputError
from lctrain.evaluation.base import Advance, Once, Result, Task, Tokens
from lctrain.evaluation.reader import Reader


@dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """A task that measures the share of facts that greedy decoding recalls, by length and depth.

    `depths` are the needle's places in the haystack: 0 is the start, 1 the end. A length counts prompt and answer, so
    a model never reads past it. Each (length, depth) has `num_trials` facts in random stretches of the held-out
    documents (`heldout`) or of the whole corpus; a trial depends only on `seed` and its own cell, so adding cells
    changes no other. `chat_template` names one of the tokenizer's templates (default, if there is only one); with None
    the model continues the text.
    """

    generates: ClassVar[bool] = True

    depths: Sequence[float]
    num_trials: int
    heldout: bool
    chat_template: str | None
    seed: int

    @property
    def name(self) -> str:
        """Return the task's name in messages."""
        return type(self).__name__.lower()

    def __post_init__(self) -> None:
        super().__post_init__()
        depths = list(self.depths)
        if not depths or depths[0] < 0 or depths[-1] > 1 or depths != sorted(set(depths)):
            raise InputError(f"{self.name} depths must ascend from 0 to 1, not {depths}")
        if self.num_trials < 1:
            raise InputError(f"{self.name} num_trials {self.num_trials} must be positive")

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> HiddenFact:
        """Return a random fact for one trial."""

    @abstractmethod
    def is_recalled(self, reply: str, answer: str) -> bool:
        """Return whether a reply is right."""

    @abstractmethod
    def num_answer_tokens(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return the number of tokens reserved for the answer, which the length includes."""

    @property
    def reads_heldout(self) -> bool:
        return self.heldout

    def num_units_at(self, length: int) -> float:
        return length * len(self.depths) * self.num_trials

    def check(self, documents: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase) -> None:
        self.check_haystack(sum(map(len, documents)))
        shortest = self.context_lengths[0]
        text = np.zeros(shortest, np.int32)
        try:
            self.prompt(tokenizer, self.draw(np.random.default_rng(self.seed)), text, shortest, self.depths[0])
        except InputError as error:
            raise InputError(f"{self.name} at length {shortest}: {error}") from error

    def check_haystack(self, available: int) -> None:
        """Raise InputError if the corpus has fewer tokens than the longest length."""
        longest = self.context_lengths[-1]
        if available < longest:
            text = "held-out text" if self.heldout else "text"
            advice = "hold out more documents, or set heldout=false" if self.heldout else "give more of it"
            raise InputError(
                f"{self.name} at length {longest} hides its needle in {text} of as many tokens and there are "
                f"{available}, {longest - available} too few: lower the evaluation's lengths, {advice}"
            )

    @torch.inference_mode()
    def run(self, reader: Reader, documents: Sequence[Tokens], once: Once, advance: Advance) -> Result:
        haystack = np.concatenate([*documents])
        haystack = haystack[
            ~np.isin(haystack, reader.tokenizer.all_special_ids)
        ]  # an end-of-text token would close the context
        haystack = haystack.astype(np.int32)
        self.check_haystack(len(haystack))

        def recalled(length: int, depth: float) -> int:
            units = length * self.num_trials
            return int(once((length, depth), units, lambda: self.cell(reader, haystack, length, depth, advance)))

        num_recalled = {n: {depth: recalled(n, depth) for depth in self.depths} for n in self.context_lengths}
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

    def cell(self, reader: Reader, haystack: NDArray[np.int32], length: int, depth: float, advance: Advance) -> int:
        """Return how many of the trials at one length and depth are recalled."""
        trials = [self.trial(reader.tokenizer, haystack, length, depth, i) for i in range(self.num_trials)]
        num_recalled = 0
        for i in range(0, len(trials), self.rows(length)):
            prompts, answers = zip(*trials[i : i + self.rows(length)], strict=True)
            replies = reader.complete(np.stack(prompts), self.num_answer_tokens(reader.tokenizer))
            num_recalled += sum(map(self.is_recalled, replies, answers))
            advance(f"{self.name} at {length:,}, depth {depth:.0%}", length * len(prompts))
        return num_recalled

    def trial(
        self, tokenizer: PreTrainedTokenizerBase, haystack: NDArray[np.int32], length: int, depth: float, index: int
    ) -> tuple[NDArray[np.int64], str]:
        """Return one prompt and its answer."""
        rng = np.random.default_rng([self.seed, length, round(depth * 10**6), index])
        start = rng.integers(len(haystack) - length + 1)
        fact = self.draw(rng)
        return self.prompt(tokenizer, fact, haystack[start : start + length], length, depth), fact.answer

    def prompt(
        self,
        tokenizer: PreTrainedTokenizerBase,
        fact: HiddenFact,
        haystack: NDArray[np.int32],
        length: int,
        depth: float,
    ) -> NDArray[np.int64]:
        """Return a prompt that leaves room for the answer within `length`."""
        num_tokens = length - self.num_answer_tokens(tokenizer)
        return fact.prompt(tokenizer, haystack, num_tokens=num_tokens, depth=depth, chat_template=self.chat_template)


def wilson_interval(num_hits: int, num_trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927), valid for few trials and at 0 and 1, unlike the normal one."""
    share, spread = num_hits / num_trials, z * z / num_trials
    centre = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / num_trials + spread / (4 * num_trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
