"""On a model whose heads are known, gates find exactly those that retrieve."""

import runpy
from pathlib import Path

import pytest
import torch

from lctrain.config import compose, root
from lctrain.export import export
from lctrain.heads import HeadPattern
from lctrain.model.install import attention_modules
from lctrain.training.run import train

SHORT = [
    *("sequence_length=256", "trainer.max_steps=48", "scheduler.num_warmup_steps=8", "scheduler.num_cooldown_steps=8"),
    *("data.num_documents=400", "data.max_characters=600", "data.num_passkeys=2", "datamodule.num_heldout_tokens=256"),
    *("logger=none", "trainer.accelerator=cpu", "kernel=sdpa"),
]
BUILT = runpy.run_path(str(root() / "data/prepare_known_heads.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("known") / "model"
    BUILT["main"](str(made))
    return made


@torch.no_grad()
def test_heads_look_where_they_are_said_to() -> None:
    model, heads = BUILT["build"](), BUILT["HEADS"]
    ids = torch.tensor([[1, *(3 + (7 * i) % 26 for i in range(60))]])  # each word follows the same one, 26 apart
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    expected = {"sink": [0], "retrieve": [25]}  # of the query at 50
    for layer, kinds in enumerate(heads):
        for head, kind in enumerate(kinds):
            for attention in attentions[layer][0, 2 * head : 2 * head + 2, 50]:
                seen = expected.get(kind) or [50 - kind]
                assert attention[seen].sum() > 0.85, (layer, head, kind)
    assert len(attention_modules(model)) == len(heads)


def test_the_model_recalls_from_afar(folder: Path) -> None:
    model = BUILT["build"]()
    ids = torch.tensor([[1, *(3 + (7 * i) % 26 for i in range(60))]])
    assert (model(ids).logits[0, 30:-1].argmax(-1) == ids[0, 31:]).all()


def test_gates_find_the_heads_that_retrieve(folder: Path, tmp_path: Path) -> None:
    cache = f"datamodule.cache_dir={tmp_path}/tokens"
    words = [f"run_dir={tmp_path}/run", f"model.path={folder}", "experiment=duo_known_heads", cache, *SHORT]
    train(compose("train", words))
    exported = export(str(tmp_path / "run"), "auto", str(tmp_path / "out"))
    known, found = HeadPattern.read(folder), HeadPattern.read(exported)
    assert found.retrieval_heads.equal(known.retrieval_heads)
    gates = torch.tensor(found.gates)
    assert gates[known.retrieval_heads].min() - gates[~known.retrieval_heads].max() > 0.3
