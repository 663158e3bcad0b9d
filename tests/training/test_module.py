"""The loss is the mean over the valid tokens of the whole step, however the step is divided; so is what it updates."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning import Callback
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from lctrain.checkpoint import read_values
from lctrain.config import compose
from lctrain.errors import InputError
from lctrain.training.metrics import read_history

UNEVEN = ["datamodule.packing=whole", "optimizer=sgd", "optimizer.lr=1", "trainer.gradient_clip_val=0.5"]
LONGER = ["rope=none", "rope.extrapolate=true"]
ONE_STEP = ["trainer.max_steps=1", "scheduler.num_warmup_steps=0", "sequence_length=128", *LONGER]


class Batches(Callback):
    """Keeps what the last run was fed."""

    seen: list[dict[str, Any]] = []  # noqa: RUF012

    def on_train_start(self, trainer, pl_module):
        type(self).seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch)


@pytest.fixture
def step(run, tmp_path):
    """One optimizer step: its batches, its row of metrics, the weights behind it."""

    def taken(accumulate: int, micro_batch_size: int, *overrides: str):
        name = f"{tmp_path}/{accumulate}x{micro_batch_size}"
        sizes = [f"trainer.accumulate_grad_batches={accumulate}", f"datamodule.micro_batch_size={micro_batch_size}"]
        run(f"run_dir={name}", f"+callbacks.batches._target_={__name__}.Batches", *sizes, *ONE_STEP, *overrides)
        state = read_values(Path(f"{name}/checkpoints/step-00000001.ckpt"))
        return Batches.seen, read_history(tmp_path / name / "metrics.jsonl")[0], state

    return taken


def test_a_step_is_the_same_however_it_is_divided(step):
    batches, row, weights = step(4, 1, *UNEVEN)
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    assert len(set(counts)) > 1  # else a mean of means would pass
    assert row["grad_norm"] > 0.5  # and is clipped
    one, other, whole = step(1, 4, *UNEVEN)
    assert len(one) == 1
    assert row["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    assert all(torch.allclose(weights[name], whole[name], rtol=0, atol=1e-6) for name in weights)


def test_a_step_is_that_of_plain_pytorch(step, saved):
    batches, row, weights = step(4, 1, *UNEVEN)
    model = AutoModelForCausalLM.from_pretrained(saved("llama", max_position_embeddings=32))
    losses = []
    for batch in batches:
        ids, labels, positions = (batch[name][0] for name in ("input_ids", "labels", "position_ids"))
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        for start, stop in pairwise(starts):  # every document alone
            logits = model(input_ids=ids[None, start:stop]).logits[0]
            losses.append(cross_entropy(logits, labels[start:stop], ignore_index=-100, reduction="sum"))
    num_valid = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    loss = torch.stack(losses).sum() / num_valid
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    torch.optim.SGD(model.parameters(), lr=1).step()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for name, weight in model.named_parameters():
        assert torch.allclose(weights[f"model.{name}"], weight, rtol=0, atol=1e-5), name


def test_a_step_without_a_valid_token_changes_nothing(step, monkeypatch, saved):
    from lctrain.data.datamodule import LongContextData

    plain = LongContextData.step_batches

    def masked(self, index):
        return [
            {**batch, "labels": torch.full_like(batch["labels"], -100), "num_valid_tokens": 0}
            for batch in plain(self, index)
        ]

    monkeypatch.setattr(LongContextData, "step_batches", masked)
    _, row, weights = step(1, 1, "optimizer=sgd", "optimizer.lr=1")
    assert (row["loss"], row["grad_norm"]) == (0, 0)
    model = AutoModelForCausalLM.from_pretrained(saved("llama", max_position_embeddings=32))
    assert all(torch.equal(weights[f"model.{name}"], weight) for name, weight in model.named_parameters())


@pytest.mark.parametrize(("loss", "why"), [("liger", "needs CUDA"), ("exact", "is none of auto, tiled, liger")])
def test_a_loss_that_cannot_run_here_is_refused_before_anything_is_written(run, tmp_path, loss, why):
    with pytest.raises(InputError, match=f"objective.loss={loss} {why}"):
        run(f"objective.loss={loss}")
    assert not (tmp_path / "run").exists()


def test_tiled_is_what_auto_is_on_cpu(step):
    assert step(2, 1, "objective.loss=tiled")[1]["loss"] == pytest.approx(step(1, 2)[1]["loss"], abs=1e-6)


def test_validation_is_the_mean_over_valid_tokens_by_position(run, saved, compose, monkeypatch):
    logged: list[dict[str, float]] = []
    cfg = compose(
        "trainer.max_steps=1", *LONGER, "sequence_length=64", "optimizer.lr=0", "trainer.val_check_interval=1"
    )
    from hydra.utils import instantiate
    from lightning.pytorch.loggers import CSVLogger

    from lctrain.training import run as training

    monkeypatch.setattr(CSVLogger, "log_metrics", lambda self, metrics, step=None: logged.append(metrics))
    cfg.logger = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": cfg.run_dir}
    training.train(cfg)
    (measured,) = [row for row in logged if "validation/perplexity" in row]
    recipe = instantiate(cfg.model, _convert_="all")
    data = instantiate(cfg.datamodule, tokenizer=recipe.tokenizer, _convert_="all")
    data.trainer = type("Alone", (), {"world_size": 1, "global_rank": 0})()
    model = recipe.build().eval()
    sums, counts = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    with torch.no_grad():
        for batch in data.val_dataloader():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
            losses = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="none")
            for loss, label, at in zip(losses, batch["labels"].flatten(), batch["position_ids"].flatten(), strict=True):
                if label != -100:
                    sums[at * 8 // 64] += loss.double()
                    counts[at * 8 // 64] += 1
    assert measured["validation/perplexity"] == pytest.approx((sums.sum() / counts.sum()).exp().item(), rel=1e-5)
    for i in range(8):
        name = f"validation/perplexity_by_position/{i + 1}_of_8"
        assert measured[name] == pytest.approx((sums[i] / counts[i]).exp().item(), rel=1e-5)


def test_the_rows_of_another_tuning_are_refused(run, tmp_path):
    run("tuning=lora", f"run_dir={tmp_path}/lora")
    checkpoint = tmp_path / "lora/checkpoints/step-00000004.ckpt"
    with pytest.raises(InputError, match="written with another tuning"):
        run(f"resume={checkpoint}", "trainer.max_steps=6")


def test_small_updates_of_a_bf16_model_are_not_lost(run, tmp_path):
    """At 2e-5, which bf16 rounds away beside most weights, embeddings, norms and adapters all move."""
    small = ["model.dtype=bfloat16", "tuning=longlora", "optimizer.lr=2e-5", "scheduler.num_warmup_steps=0"]
    run(f"run_dir={tmp_path}/bf16", *small, "trainer.max_steps=3", "callbacks.checkpoint.every_num_steps=1")
    first, last = (read_values(tmp_path / f"bf16/checkpoints/step-0000000{step}.ckpt") for step in (2, 3))
    assert {weight.dtype for weight in last.values()} == {torch.float32}
    assert [name for name in last if torch.equal(first[name], last[name])] == []


def test_what_trained_stays_on_its_device():
    """Lightning ends a fit with module.cpu(); the host's memory may be full of pinned inputs then."""
    module = instantiate(compose("train", []).module, _convert_="all")
    module.model = torch.nn.Linear(2, 2, device="meta")
    assert module.cpu() is module
    assert module.model.weight.is_meta
