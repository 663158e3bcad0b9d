"""A byte tokenizer (one token a byte), corpora in memory, and a data module with a stub for the trainer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lctrain.data.corpus import Corpus, Document
from lctrain.data.curriculum import Fixed
from lctrain.data.datamodule import LongContextData


@dataclass(frozen=True, kw_only=True)
class ListCorpus(Corpus):
    """Documents given as they are."""

    items: Sequence[Document]

    def documents(self) -> Iterator[Document]:
        yield from self.items


@pytest.fixture
def corpus_of() -> Callable[[Mapping[str, str]], Corpus]:
    """Makes a corpus of names and their texts."""
    return lambda texts: ListCorpus(items=[Document(name=name, text=text) for name, text in texts.items()])


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """BOS, EOS, one token that only chat templates write, and every byte."""
    vocabulary = ["<s>", "</s>", "<|turn|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|turn|>"]
    )


@pytest.fixture
def corpus(corpus_of: Callable[[Mapping[str, str]], Corpus]) -> Corpus:
    """60 documents of 1 to 400 characters, all different."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh \n"), size=size)) for size in rng.integers(1, 400, 60)]
    return corpus_of({f"doc{i}": text for i, text in enumerate(texts)})


@pytest.fixture
def build_data(tmp_path: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> Callable[..., LongContextData]:
    """Data modules over the same corpus; keywords replace the defaults and the trainer's attributes."""

    def build(*, accumulate: int = 1, world: int = 1, rank: int = 0, step: int = 0, **changes: Any) -> LongContextData:
        settings: dict[str, Any] = {
            "corpus": corpus,
            "tokenizer": tokenizer,
            "sequence_length": 64,
            "micro_batch_size": 2,
            "packing": "stream",
            "heldout_fraction": 0.2,
            "num_heldout_tokens": 1000,
            "cache_dir": str(tmp_path / "cache"),
            "seed": 0,
        }
        settings.update(changes)
        settings.setdefault("curriculum", Fixed(sequence_length=settings["sequence_length"]))
        data = LongContextData(**settings)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            world_size=world, global_rank=rank, accumulate_grad_batches=accumulate, global_step=step
        )
        return data

    return build
