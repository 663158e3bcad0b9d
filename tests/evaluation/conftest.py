"""A tokenizer of single bytes, a random Llama of its size, and held-out documents, all in memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lctrain.attention.full import FullAttention
from lctrain.evaluation.reader import Reader
from lctrain.model.install import install


@pytest.fixture(scope="session")
def tokenizer():
    letters = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="session")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    install(model, FullAttention(), "sdpa")
    return model


@pytest.fixture
def documents(tokenizer):
    """Of 40, 300, 61, 130 and 700 tokens, the first and the last of each special."""
    random = np.random.default_rng(0)
    return [np.array([0, *random.integers(34, 90, n - 2), 1], np.int32) for n in (40, 300, 61, 130, 700)]


@pytest.fixture
def data(tokenizer, documents):
    """Those documents held out, and two more."""
    more = [np.full(90, 40 + i, np.int32) for i in range(2)]
    return SimpleNamespace(
        tokenizer=tokenizer, heldout_documents=lambda: documents, documents=lambda: [*documents, *more]
    )


@pytest.fixture
def reader(model, tokenizer):
    return Reader(model=model, tokenizer=tokenizer)


@pytest.fixture
def measure(reader):
    """Runs a task from its first cell: the model's own, or that of another reader."""

    def run(task, documents, by=None, advance=lambda *_: None):
        return task.run(by or reader, documents, lambda cell, num_units, measure: measure(), advance)

    return run


class Stub:
    """Answers every prompt with `reply(prompt text)` and keeps what it was asked."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, reply):
        self.tokenizer, self.reply, self.prompts = tokenizer, reply, []

    def get_decoder(self):
        return lambda *_, **__: None

    def generate(self, input_ids, attention_mask, past_key_values, generation_config):
        texts = self.tokenizer.batch_decode(input_ids)
        self.prompts += [(len(ids), text) for ids, text in zip(input_ids, texts, strict=True)]
        room = generation_config.max_new_tokens
        replies = [self.tokenizer.encode(self.reply(text).ljust(room)[:room]) for text in texts]
        return torch.cat([input_ids, torch.tensor(replies)], dim=1)


@pytest.fixture
def ask(tokenizer, documents, measure):
    """Runs a task on a model that answers `reply(prompt)`; gives the result and the prompts with their lengths."""

    def run(task, reply, texts=None, tokenizer=tokenizer):
        stub, cache = Stub(tokenizer, reply), SimpleNamespace(new=lambda model: DynamicCache())
        return measure(
            task, documents if texts is None else texts, Reader(model=stub, tokenizer=tokenizer, cache=cache)
        ), stub.prompts

    return run
