"""Perplexity of held-out text by context length and by position. Shapes: B rows, L tokens."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lctrain.errors import InputError
from lctrain.evaluation.base import Advance, Once, Quantity, Result, Task, Tokens
from lctrain.evaluation.reader import Reader
from lctrain.model.head import check_head

Sums = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Perplexity(Task):
    """A task that measures perplexity, exp(mean negative log-likelihood per token), of the same text at every length.

    The text is `num_tokens` tokens of the documents that are longer than the longest length, in whole spans of that
    length (at least one), taken from the documents in turns so that no single document dominates. Each token of the
    text is predicted exactly once at every length: windows of one length advance by `stride` tokens (None: by their
    length, so they do not overlap) and score only the tokens that the previous window did not. A smaller stride gives
    each token more context and costs length / stride times as much. Inside the longest window, `num_buckets` equal
    ranges of positions are reported separately.
    """

    quantity: ClassVar[Quantity] = Quantity("perplexity", "per token")

    num_tokens: int
    stride: int | None
    num_buckets: int

    def __post_init__(self) -> None:
        super().__post_init__()
        shortest, longest = self.context_lengths[0], self.context_lengths[-1]
        if self.stride is not None and not 1 <= self.stride <= shortest:
            raise InputError(f"perplexity stride {self.stride} must lie in 1..{shortest}, the shortest of its lengths")
        if not 1 <= self.num_buckets <= longest:
            raise InputError(f"perplexity num_buckets {self.num_buckets} must lie in 1..{longest}, the longest length")
        if self.num_tokens < 1:
            raise InputError(f"perplexity num_tokens {self.num_tokens} must be positive")

    def num_units_at(self, length: int) -> float:
        return self.num_tokens * length / (self.stride or length)

    def check(self, documents: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase) -> None:
        longest = self.context_lengths[-1]
        available = max(map(len, documents), default=0)
        if available <= longest:
            raise InputError(
                f"perplexity at length {longest} needs a held-out document of at least {longest + 1} tokens,"
                f" the longest has {available}: lower the evaluation's lengths or hold out longer documents"
            )

    def texts(self, documents: Sequence[Tokens]) -> list[Tokens]:
        """Return the starts of long documents: each a multiple of the longest length, and one token more."""
        longest = self.context_lengths[-1]
        spans = sorted((i, doc) for doc, ids in enumerate(documents) for i in range((len(ids) - 1) // longest))
        num_spans = Counter(doc for _, doc in spans[: max(1, self.num_tokens // longest)])
        return [documents[doc][: n * longest + 1] for doc, n in sorted(num_spans.items())]

    @torch.inference_mode()
    def run(self, reader: Reader, documents: Sequence[Tokens], once: Once, advance: Advance) -> Result:
        self.check(documents, reader.tokenizer)
        texts = self.texts(documents)
        check_head(reader.model)

        def scored(length: int) -> Result:
            measured: Result = once(
                (length,), self.num_units_at(length), lambda: self.score(reader, texts, length, advance)
            )
            return measured

        scores = {length: scored(length) for length in self.context_lengths}
        nll = {str(length): score["nll"] / score["num_tokens"] for length, score in scores.items()}
        num_tokens = sum(len(text) - 1 for text in texts)
        decoded = reader.tokenizer.batch_decode([text[1:].tolist() for text in texts])
        num_bytes = sum(len(text.encode()) for text in decoded)
        return {
            "by_length": {length: math.exp(mean) for length, mean in nll.items()},
            "bits_per_byte": {length: mean / math.log(2) * num_tokens / num_bytes for length, mean in nll.items()},
            "by_position": scores[self.context_lengths[-1]]["by_position"],
            "num_tokens": num_tokens,
            "num_documents": len(texts),
        }

    def score(self, reader: Reader, texts: Sequence[Tokens], length: int, advance: Advance) -> Result:
        """Return the summed negative log-likelihood, the number of scored tokens, and both by position.

        `by_position` is None except at the longest length.
        """
        jobs = [(text, *window) for text in texts for window in windows(len(text) - 1, length, self.stride or length)]
        sums, counts = np.zeros(length), np.zeros(length)
        for i in range(0, len(jobs), self.rows(length)):
            batch = jobs[i : i + self.rows(length)]
            ids = np.stack([text[start : start + length + 1] for text, start, _ in batch])
            losses_BL = reader.losses(ids.astype(np.int64)).cpu().double().numpy()
            scored_BL = np.arange(length) >= np.array([[first] for _, _, first in batch])
            sums += (losses_BL * scored_BL).sum(0)
            counts += scored_BL.sum(0)
            advance(f"perplexity at {length:,}", self.num_units_at(length) * len(batch) / len(jobs))
        by_position = self.by_position(sums, counts) if length == self.context_lengths[-1] else None
        return {"nll": sums.sum(), "num_tokens": counts.sum(), "by_position": by_position}

    def by_position(self, sums: Sums, counts: Sums) -> Result:
        """Return the perplexity of each range [start, end) of positions; position p predicts from p + 1 tokens."""
        edges = np.linspace(0, len(sums), self.num_buckets + 1).astype(int)
        num_tokens = np.add.reduceat(counts, edges[:-1])
        return {
            "start": edges[:-1].tolist(),
            "end": edges[1:].tolist(),
            "perplexity": np.exp(np.add.reduceat(sums, edges[:-1]) / num_tokens).tolist(),
            "num_tokens": num_tokens.astype(int).tolist(),
        }


def windows(num_tokens: int, length: int, stride: int) -> list[tuple[int, int]]:
    """Return (start, first position scored) of each window; the last ends with the text, so it may advance by less."""
    ends = [*range(length, num_tokens, stride), num_tokens]
    return [(end - length, length - (end - before)) for before, end in zip([0, *ends], ends, strict=False)]
