"""A tokenizer of single bytes, a random Llama of its size, documents in memory, and the tasks of conf/evaluation.

A task's own test file declares `CASES`: name → (yaml, fields at which the task measures a few cells in seconds). For
the first of them it declares `FIELDS`, another value of each field, and `REFUSED`, pairs of fields that `check` refuses
and its message.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lctrain.attention.full import FullAttention
from lctrain.config import conf_dir
from lctrain.evaluation.reader import Reader
from lctrain.model.install import install

FILES = {path: runpy.run_path(str(path)) for path in sorted(Path(__file__).parent.glob("test_*.py"))
         if path.stem != "test_tasks"}  # fmt: skip
DECLARED = [file for file in FILES.values() if "CASES" in file]
CASES = {name: case for file in DECLARED for name, case in file["CASES"].items()}
FIELDS = {next(iter(file["CASES"])): file["FIELDS"] for file in DECLARED}
REFUSED = {next(iter(file["CASES"])): file["REFUSED"] for file in DECLARED}
CHAT_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@pytest.fixture(scope="session")
def task_of():
    """Tasks by the names above, with other fields."""

    def make(name, **changes):
        yaml, fields = CASES[name]
        group = OmegaConf.load(conf_dir() / "evaluation" / f"{yaml}.yaml")
        whole = OmegaConf.create({"sequence_length": 512, "seed": 0, "evaluation": group})
        ((task, settings),) = whole.evaluation.items()
        OmegaConf.update(whole, f"evaluation.{task}", fields | changes)
        return instantiate(settings, _convert_="all")

    return make


@pytest.fixture(scope="session")
def make_tokenizer():
    """Tokenizers of single bytes with other special tokens than <eos>, or none."""
    letters = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]

    def make(**special):
        backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **special)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer(bos_token="<bos>", chat_template=CHAT_TEMPLATE)


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
    """Those documents held out, and two more: of one word, and of many."""
    words = " ".join(f"w{i % 10}{'.' if i % 7 == 0 else ''}" for i in range(1000))
    more = [np.full(90, 40, np.int32), np.array(tokenizer.encode(words), np.int32)]
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
