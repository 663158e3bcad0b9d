"""What is recorded of a step is what happened in it, and a step that diverged does not happen."""

import json
import math
import re
from pathlib import Path

import pytest
from lightning import Callback

from lctrain.checkpoint import read_values
from lctrain.errors import RunError
from lctrain.training.metrics import read_history, write_aside

HERE = Path(__file__).parent


class Witness(Callback):
    """Computes each step's record by other means: gradients, rate and tokens as they are when the optimizer steps."""

    steps: list[dict[str, float]] = []  # noqa: RUF012  the last run's
    tokens = 0

    def on_train_start(self, trainer, pl_module):
        type(self).steps = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.tokens += batch["input_ids"].numel()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        squares = sum(float((p.grad.double() ** 2).sum()) for p in pl_module.parameters() if p.grad is not None)
        row = {"grad_norm": math.sqrt(squares), "lr": optimizer.param_groups[0]["lr"], "tokens": self.tokens}
        self.steps.append(row)


@pytest.fixture
def rows(run, tmp_path):
    """Runs under overrides: the recorded rows, and the witness's."""

    def recorded(*overrides: str):
        run(f"+callbacks.witness._target_={__name__}.Witness", *overrides)
        return read_history(tmp_path / "run/metrics.jsonl"), Witness.steps

    return recorded


def test_gradient_norm_rate_and_tokens_are_those_of_the_step(rows):
    recorded, witnessed = rows("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.01")
    for row, seen in zip(recorded, witnessed, strict=True):
        assert row["grad_norm"] == pytest.approx(seen["grad_norm"], rel=1e-6)  # before clipping
        assert row["grad_norm"] > 0.01
        assert row["tokens"] == seen["tokens"]
        assert row["lr"] == seen["lr"]
    warmup = [0.01 * (step + 1) / 3 for step in range(2)]
    assert [row["lr"] for row in recorded[:2]] == pytest.approx(warmup)


def test_length_perplexity_and_speed_of_each_stage(rows):
    recorded, _ = rows("curriculum=staged")
    assert [row["sequence_length"] for row in recorded] == [16, 32, 64, 64]
    assert [row["tokens"] for row in recorded] == [64, 128, 192, 256]  # constant a step
    for row in recorded:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["tokens_per_second"] > 0
        assert 0 < row["model_flops_utilization"] < 1
        assert row["peak_memory_gib"] > 0.05


def test_tokens_go_on_where_a_resumed_run_was(rows, run):
    run("trainer.max_steps=2", "scheduler.num_steps=4")
    recorded, _ = rows("resume=auto")
    assert [row["tokens"] for row in recorded] == [64, 128, 192, 256]


def test_speed_is_the_median_of_the_steps(run, tmp_path):
    speeds = sorted(row["tokens_per_second"] for row in run("trainer.max_steps=3").history)
    assert run(f"run_dir={tmp_path}/other", "trainer.max_steps=3").tokens_per_second > 0
    assert len(speeds) == 3


def test_a_loss_that_is_nan_stops_before_the_update_and_names_the_batch(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    poison = ["+callbacks.poison._target_=sabotage.Poison", "+callbacks.poison.step=4"]
    saves = ["callbacks.checkpoint.every_num_steps=2", "trainer.accumulate_grad_batches=2"]
    last = tmp_path / "run/checkpoints/step-00000002.ckpt"
    line = f"the loss of step 4 is nan; nothing was updated, the last checkpoint is {last}"
    with pytest.raises(RunError, match=re.escape(line)):
        run(*saves, *poison)
    assert [path.name for path in last.parent.iterdir()] == [last.name]
    assert all(tensor.isfinite().all() for tensor in read_values(last).values())
    assert [row["step"] for row in read_history(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]
    assert run(*saves, "resume=auto").steps == 4


def test_a_run_that_diverges_stops(run, tmp_path):
    with pytest.raises(RunError, match=r"of step 2 is (nan|inf); nothing was updated, there is no checkpoint yet"):
        run("optimizer=sgd", "optimizer.lr=1e38", "trainer.gradient_clip_val=null")
    assert not (tmp_path / "run/checkpoints").exists()


class InfiniteGradient(Callback):
    def on_after_backward(self, trainer, pl_module):
        next(pl_module.parameters()).grad.view(-1)[0] = math.inf


def test_a_gradient_that_is_infinite_stops_too(run):
    with pytest.raises(RunError, match="the gradient of step 1 is inf"):
        run(f"+callbacks.infinite._target_={__name__}.InfiniteGradient")


def test_a_history_cut_off_by_a_crash_is_read_up_to_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_history(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_history(path) == [{"step": 1}, {"step": 2}]
    write_aside(path, json.dumps({"step": 3}) + "\n")
    assert read_history(path) == [{"step": 3}]
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_terminal_progress_is_a_line_now_and_then(run, capsys):
    run()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/4", "4/4"]
    for word in ("loss ", "perplexity ", " tokens/s", "length 64"):
        assert all(word in line for line in lines)
