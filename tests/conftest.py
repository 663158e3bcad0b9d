"""Tiny random models, one per family, in memory and as saved folders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lctrain import config

torch.set_num_threads(1)  # threads of tiny tensors only wait for each other

VOCAB_SIZE = 64
SHAPE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Makes random models: tiny("mistral", sliding_window=8)."""

    def make(model_type: str, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**SHAPE, **changes})
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases start at 0 or 1: a dropped one would go unseen
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return make


@pytest.fixture(scope="session")
def saved(tiny: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders in Hugging Face format, of the same models with a tokenizer; not to be written to."""
    folders: dict[str, Path] = {}

    def save(model_type: str, **changes: Any) -> Path:
        key = f"{model_type} {sorted(changes.items())}"
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(model_type)
            tiny(model_type, **changes).save_pretrained(folders[key])
            words = {f"w{i}": i for i in range(VOCAB_SIZE)}
            tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
            tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0", eos_token="w1")
            fast.save_pretrained(folders[key])
        return folders[key]

    return save


@pytest.fixture
def ids() -> Callable[..., torch.Tensor]:
    """Random tokens [rows, length], the same for the same shape and seed."""

    def make(rows: int, length: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 files of 20 to 300 words, in which often the next word follows from the last."""
    folder, generator = tmp_path_factory.mktemp("text"), torch.Generator().manual_seed(0)
    for i in range(40):
        steps = torch.randint(1, 4, (20 + 7 * i,), generator=generator).cumsum(0) % (VOCAB_SIZE - 4) + 4
        (folder / f"{i}.txt").write_text(" ".join(f"w{step}" for step in steps.tolist()))
    return folder


@pytest.fixture
def small(
    saved: Callable[..., Path], text: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """The overrides of a small run in `tmp_path/run`, and others behind them."""
    base, cache = saved("llama", max_position_embeddings=32), tmp_path_factory.getbasetemp() / "tokens"
    words = f"""run_dir={tmp_path}/run model.path={base} data=text data.path={text} datamodule.cache_dir={cache}
        datamodule.num_heldout_tokens=256 sequence_length=64 rope=linear logger=none trainer.accelerator=cpu
        trainer.max_steps=4 scheduler.num_warmup_steps=2 optimizer.lr=1e-2
        callbacks.checkpoint.every_num_minutes=null"""

    def overrides(*others: str) -> list[str]:
        replaced = {other.partition("=")[0] for other in others}
        return [*(word for word in words.split() if word.partition("=")[0] not in replaced), *others]

    return overrides


@pytest.fixture
def compose(small: Callable[..., list[str]]) -> Callable[..., DictConfig]:
    """The config of a small run under overrides."""
    return lambda *overrides: config.compose("train", small(*overrides))


@pytest.fixture
def run(compose: Callable[..., DictConfig]) -> Callable[..., Any]:
    """`lctrain train` of a small run under overrides, in this process and without export or evaluation."""
    from lctrain.training.run import train

    return lambda *overrides: train(compose(*overrides))
