"""Every yaml of the room composes, names all fields of what it builds, and builds it where that needs no network."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from lctrain.data.corpus import Corpus
from lctrain.data.curriculum import Curriculum
from lctrain.data.datamodule import LongContextData

CONF = Path(__file__).parents[2] / "conf"
DATA = sorted(file.stem for file in (CONF / "data").glob("*.yaml"))
CURRICULA = sorted(file.stem for file in (CONF / "curriculum").glob("*.yaml"))


def composed(group: str, name: str, *overrides: str) -> DictConfig:
    values = ["+seed=0", "+sequence_length=4096", "+trainer.max_steps=100", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(f"{group}/{name}", values)[group]


@pytest.mark.parametrize("name", DATA)
def test_every_corpus_composes_and_builds(name: str, tmp_path: Path) -> None:
    required = {"text": ["data.path"], "jsonl": ["data.path"], "chat": ["data.path"], "hub": ["data.name"]}.get(
        name, []
    )
    config = composed("data", name, *(f"{key}={tmp_path}" for key in required))
    corpus = instantiate(config)
    assert isinstance(corpus, Corpus)
    assert set(config) - {"_target_", "_convert_"} == {field.name for field in fields(corpus)}


@pytest.mark.parametrize("name", CURRICULA)
@pytest.mark.parametrize("convert", ["none", "all"])
def test_every_curriculum_composes_and_builds(name: str, convert: str) -> None:
    config = composed("curriculum", name)
    curriculum = instantiate(config, _convert_=convert)
    assert isinstance(curriculum, Curriculum)
    assert set(config) - {"_target_"} == {field.name for field in fields(curriculum) if field.default is MISSING}
    assert curriculum.length_at(99, 4096) == curriculum.lengths()[-1] == 4096


@pytest.mark.parametrize("name", ["passkey", "stdlib_recall"])
def test_the_synthetic_corpora_read(name: str) -> None:
    corpus = instantiate(composed("data", name))
    assert sum("#passkey-" in document.name for document in corpus.documents()) == 4000
    assert corpus.size_hint() >= 4000


def test_the_data_module_builds_from_its_groups(tokenizer: Any, tmp_path: Path) -> None:
    groups = ["+data=stdlib", "+curriculum=fixed", "+datamodule=default"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(None, ["+seed=0", "+sequence_length=256", *groups, f"datamodule.cache_dir={tmp_path}"])
    assert get_class(config.datamodule._target_) is LongContextData
    data = instantiate(config.datamodule, tokenizer=tokenizer)
    assert isinstance(data, LongContextData)
    assert data.sequence_length == 256
