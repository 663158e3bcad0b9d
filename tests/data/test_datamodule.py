"""Batches as training sees them."""

from collections.abc import Callable
from itertools import islice, pairwise
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from lctrain.data.batch import Batch
from lctrain.data.corpus import Corpus
from lctrain.data.curriculum import Curriculum, Fixed, Staged
from lctrain.data.datamodule import LongContextData
from lctrain.data.mixture import MixtureCorpus
from lctrain.data.passkey import PasskeyCorpus
from lctrain.errors import InputError

Build = Callable[..., LongContextData]
STAGES = [{"fraction": 0.25, "steps": 2}, {"sequence_length": 24, "steps": 2}, {"fraction": 1.0}]


def staged() -> Curriculum:
    return Staged(sequence_length=64, num_steps=-1, stages=STAGES)


def batches(data: LongContextData, count: int) -> list[Batch]:
    return list(islice(data.train_dataloader(), count))


def fragments(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of every fragment of every row, found by the positions alone."""
    found = []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for start, stop in pairwise(starts):
            assert positions[start:stop].tolist() == list(range(stop - start))
            found.append((ids[start:stop].tolist(), labels[start:stop].tolist()))
    return found


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(bool(torch.all(torch.as_tensor(a[k]) == torch.as_tensor(b[k]))) for k in a)


@pytest.mark.parametrize("curriculum", [Fixed(sequence_length=64), staged()])
def test_each_token_but_a_documents_first_is_predicted_once(build_data: Build, curriculum: Curriculum) -> None:
    data = build_data(curriculum=curriculum)
    wanted = sorted(tuple(data.table.tokens(i)) for i in data.train_documents)
    num_tokens = sum(map(len, wanted))
    documents: list[tuple[int, ...]] = []
    predicted: list[int] = []
    taken = 0
    for batch in data.train_dataloader():
        for ids, labels in fragments(batch):
            if taken >= num_tokens or (all(label == -100 for label in labels) and ids[0] == ids[-1] == 1 != len(ids)):
                continue  # the next epoch; padding
            taken += len(ids)
            if ids[0] == 0:  # BOS: a document begins
                documents.append(())
            assert not predicted or ids[0] == predicted[-1] or ids[0] == 0
            documents[-1] += tuple(ids)
            predicted = labels
            assert labels[:-1] == ids[1:]
            assert (labels[-1] == -100) == (ids[-1] == 1)  # EOS: a document ends
        if taken >= num_tokens:
            break
    assert sorted(documents) == wanted


@pytest.mark.parametrize("packing", ["stream", "whole"])
def test_any_split_of_a_step_gives_the_same_global_batch(build_data: Build, packing: str) -> None:
    def steps(accumulate: int, world: int) -> list[list[str]]:
        settings: dict[str, Any] = {"packing": packing, "curriculum": staged(), "sequence_length": 64}
        ranks = [build_data(accumulate=accumulate, world=world, rank=rank, **settings) for rank in range(world)]
        columns = [batches(data, 6 * accumulate) for data in ranks]
        names = ("input_ids", "labels", "position_ids")
        contents = [[str([b[n].tolist() for n in names]) for b in column] for column in columns]
        return [
            sorted(c for column in contents for c in column[i * accumulate : (i + 1) * accumulate]) for i in range(6)
        ]

    assert steps(4, 1) == steps(2, 2) == steps(1, 4)


@pytest.mark.parametrize("packing", ["stream", "whole"])
def test_resuming_at_a_step_goes_on_where_the_run_was(build_data: Build, packing: str) -> None:
    settings: dict[str, Any] = {"packing": packing, "curriculum": staged(), "accumulate": 2}
    whole = batches(build_data(**settings), 20)
    resumed = batches(build_data(step=7, **settings), 6)
    assert all(same(a, b) for a, b in zip(whole[14:], resumed, strict=True))


def test_tokens_per_step_are_constant_over_the_curriculum(build_data: Build) -> None:
    lengths, tokens = [], []
    for batch in batches(build_data(curriculum=staged()), 6):
        lengths.append(batch["input_ids"].shape[1])
        padding = sum(len(ids) for ids, labels in fragments(batch)[-1:] if set(ids) == {1} and set(labels) == {-100})
        tokens.append(batch["input_ids"].numel() - padding)
    assert lengths == [16, 16, 24, 24, 64, 64]
    assert tokens == [128] * 6


def test_num_valid_tokens_is_that_of_the_step(build_data: Build) -> None:
    two = batches(build_data(accumulate=2), 2)
    valid = sum(int((batch["labels"] != -100).sum()) for batch in two)
    assert two[0]["num_valid_tokens"] == two[1]["num_valid_tokens"] == valid


def test_tensors_are_int64(build_data: Build) -> None:
    batch = batches(build_data(), 1)[0]
    assert {batch[n].dtype for n in ("input_ids", "labels", "position_ids")} == {torch.int64}
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (2, 64)


def test_the_seed_changes_the_order(build_data: Build) -> None:
    assert not same(batches(build_data(), 1)[0], batches(build_data(seed=1), 1)[0])


def test_held_out_documents_are_never_trained_on(build_data: Build) -> None:
    data = build_data(packing="whole")
    heldout = {tuple(tokens) for tokens in data.heldout_documents()}
    seen = {tuple(ids) for batch in batches(data, 300) for ids, _ in fragments(batch)}
    trained = {tuple(data.table.tokens(i)) for i in data.train_documents if data.table.lengths[i] <= 64}
    assert len(heldout) > 3
    assert trained <= seen
    assert not heldout & seen
    assert heldout < {tuple(tokens) for tokens in data.documents()} >= trained


def test_variants_of_a_held_out_text_are_not_trained_on(build_data: Build, corpus: Corpus) -> None:
    recall = PasskeyCorpus(haystack=corpus, num_documents=80, min_characters=20, max_characters=300)
    mixed = build_data(
        corpus=MixtureCorpus(corpora={"text": corpus, "recall": recall}, epochs={"text": 2, "recall": 1})
    )
    plain, names = build_data(), mixed.table.names()
    heldout = {plain.table.names()[i] for i in plain.unseen_documents}
    assert not heldout & {names[i].partition("#")[0] for i in mixed.train_documents}
    assert any("#" in names[i] for i in mixed.train_documents)
    assert {names[i] for i in mixed.unseen_documents} == heldout
    assert [t.tolist() for t in mixed.heldout_documents()] == [t.tolist() for t in plain.heldout_documents()]


def test_validation_rows_are_the_held_out_documents(build_data: Build) -> None:
    data = build_data()
    rows = data.val_dataloader()
    assert all(batch["input_ids"].shape[1] == 64 for batch in rows)
    ids = np.concatenate([batch["input_ids"].flatten() for batch in rows])
    assert ids[:1000].tolist() == np.concatenate(data.heldout_documents())[:1000].tolist()
    assert sum(batch["num_valid_tokens"] for batch in rows) < 1000


@pytest.mark.parametrize("world", [2, 3, 100])
def test_every_rank_validates_as_often(build_data: Build, world: int) -> None:
    ranks = [build_data(world=world, rank=rank).val_dataloader() for rank in range(world)]
    assert {len(rank) for rank in ranks} == {max(1, 8 // world)}


def test_nothing_held_out_is_refused(build_data: Build, corpus_of: Callable[..., Corpus]) -> None:
    with pytest.raises(InputError, match="heldout_fraction"):
        build_data(corpus=corpus_of({"only": "one document"}), heldout_fraction=0.01).setup("fit")


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": "tetris"},
        {"heldout_fraction": 0.0},
        {"heldout_fraction": 1.0},
        {"micro_batch_size": 0},
        {"num_heldout_tokens": 0},
        {"curriculum": Fixed(sequence_length=65)},
    ],
)
def test_settings_that_cannot_work_are_refused(build_data: Build, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        build_data(**changes)


class Recorder(lightning.LightningModule):
    """A model of one weight that keeps what it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.num_validated = 0

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"].flatten().tolist())
        return self.weight * 1.0

    def validation_step(self, batch: Batch, index: int) -> None:
        self.num_validated += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_trains_validates_and_resumes(build_data: Build, tmp_path: Any) -> None:
    def fit(max_steps: int, resume: Any = None) -> tuple[lightning.Trainer, Recorder]:
        data, model = build_data(), Recorder()
        data.trainer = None
        trainer = lightning.Trainer(
            max_steps=max_steps,
            max_epochs=-1,
            accumulate_grad_batches=2,
            val_check_interval=4,
            num_sanity_val_steps=0,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(model, datamodule=data, ckpt_path=resume)
        return trainer, model

    uninterrupted = fit(6)[1]
    trainer, first = fit(3)
    trainer.save_checkpoint(tmp_path / "at3.ckpt")
    second = fit(6, tmp_path / "at3.ckpt")[1]
    assert len(uninterrupted.seen) == 12
    assert uninterrupted.num_validated > 0
    assert first.seen + second.seen == uninterrupted.seen
