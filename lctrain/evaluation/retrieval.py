"""The base class of recall tasks: recall of a fact hidden in other text, by context length and depth of the fact."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lctrain.data.needle import HiddenFact
from lctrain.errors import InputError
from lctrain.evaluation.base import SHARE, Cell, Quantity, Result, Texts, Tokens
from lctrain.evaluation.generation import Example, Examples, Generation


@dataclass(frozen=True, kw_only=True)
class Retrieval(Generation):
    """A task that measures the share of facts that greedy decoding recalls, by length and depth.

    `depths` are the needle's places in the haystack: 0 is the start, 1 the end. A length counts prompt and answer, so
    a model never reads past it. Each (length, depth) has `num_trials` facts in random stretches of the held-out
    documents (`heldout`) or of the whole corpus; a trial depends only on `seed` and its own cell, so adding cells
    changes no other. `chat_template` names one of the tokenizer's templates (default, if there is only one); with None
    the model continues the text.
    """

    quantity: ClassVar[Quantity] = Quantity("recall", SHARE)

    depths: Sequence[float]
    num_trials: int
    heldout: bool
    chat_template: str | None
    seed: int

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

    def documents(self, texts: Texts) -> Sequence[Tokens]:
        return texts.heldout_documents() if self.heldout else texts.documents()

    @property
    def num_examples(self) -> int:
        return len(self.depths) * self.num_trials

    def cells(self, length: int) -> Sequence[Cell]:
        return [(length, depth) for depth in self.depths]

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

    def examples(self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Tokens]) -> Examples:
        haystack = np.concatenate([*documents])
        # an end-of-text token would close the context
        haystack = haystack[~np.isin(haystack, tokenizer.all_special_ids)].astype(np.int32)
        self.check_haystack(len(haystack))

        def of_cell(cell: Cell) -> Sequence[Example]:
            length, depth = cell
            return [self.trial(tokenizer, haystack, int(length), depth, i) for i in range(self.num_trials)]

        return of_cell

    def trial(
        self, tokenizer: PreTrainedTokenizerBase, haystack: NDArray[np.int32], length: int, depth: float, index: int
    ) -> Example:
        """Return one trial of a cell."""
        rng = np.random.default_rng([self.seed, length, round(depth * 10**6), index])
        start = rng.integers(len(haystack) - length + 1)
        fact = self.draw(rng)
        prompt = self.prompt(tokenizer, fact, haystack[start : start + length], length, depth)
        return Example(prompt=prompt, references=[fact.answer], num_tokens=self.num_answer_tokens(tokenizer))

    def score(self, reply: str, example: Example) -> float:
        return float(self.is_recalled(reply, example.references[0]))

    def details(self, scores: Mapping[Cell, Sequence[float]]) -> Result:
        by_depth: dict[str, dict[str, float]] = {str(length): {} for length in self.context_lengths}
        for (length, depth), recalled in scores.items():
            by_depth[str(length)][str(depth)] = sum(recalled) / self.num_trials
        return {"by_depth": by_depth}

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
