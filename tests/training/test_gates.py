"""What is recorded of gates is what they are; they stay within their bounds; the picture is one of layers and heads."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from lctrain.checkpoint import read_values
from lctrain.errors import InputError
from lctrain.folder import read_history
from lctrain.training.gates import PICTURE, Gates, gate_heatmap

DUO = [
    *("attention=duo", "attention.num_sink_tokens=2", "attention.recent_size=4", "tuning=gates", "objective=duo"),
    *("callbacks=gates", "optimizer=sgd", "optimizer.lr=30", "scheduler.num_warmup_steps=0"),
]


def gates_of(folder):
    (checkpoint,) = sorted((folder / "checkpoints").iterdir())[-1:]
    return torch.stack(list(read_values(checkpoint).values()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clamped_gates_stay_within_0_and_1_and_are_what_is_recorded(run, tmp_path, accumulate):
    run(*DUO, "callbacks.gates.threshold=0.25", f"trainer.accumulate_grad_batches={accumulate}")
    (first, *_, last), gates = read_history(tmp_path / "run/metrics.jsonl"), gates_of(tmp_path / "run")
    assert gates.shape == (2, 2)
    assert gates.min() >= 0
    assert gates.max() <= 1
    assert first["gates/mean"] == 0  # 30 · 0.05 from 1: the step went past the bound
    assert last["gates/mean"] == pytest.approx(float(gates.mean()))
    assert last["gates/share_above_threshold"] == pytest.approx(float((gates > 0.25).float().mean()))
    assert (tmp_path / "run" / PICTURE).is_file()


def test_gates_that_are_not_clamped_go_where_the_optimizer_puts_them(run, tmp_path):
    run(*DUO, "attention.clamp=false")
    gates = gates_of(tmp_path / "run")
    assert (gates < 0).any() or (gates > 1).any()


def test_a_stopped_run_goes_on_with_the_same_gates(run, tmp_path):
    run(*DUO, f"run_dir={tmp_path}/whole")
    run(*DUO, f"run_dir={tmp_path}/parts", "trainer.max_steps=2", "scheduler.num_steps=4")
    run(*DUO, f"run_dir={tmp_path}/parts", "resume=auto")
    assert torch.equal(gates_of(tmp_path / "parts"), gates_of(tmp_path / "whole"))


def test_the_picture_is_dark_where_heads_retrieve(tmp_path):
    gates = torch.zeros(6, 8)
    gates[1, 2] = 1
    gate_heatmap(gates, "Gates").savefig(tmp_path / "one.png", dpi=100)
    gate_heatmap(torch.zeros(6, 8), "Gates").savefig(tmp_path / "none.png", dpi=100)
    difference = np.abs(imread(tmp_path / "one.png") - imread(tmp_path / "none.png")).sum(-1) > 0.5
    rows, columns = difference.nonzero()
    height, width = difference.shape
    assert difference.mean() > 0.005
    assert rows.max() < height / 2  # the second layer of six, counted downwards
    assert columns.max() < width / 2  # the third head of eight


def test_the_picture_names_its_axes_and_keeps_its_scale():
    figure = gate_heatmap(torch.full((32, 8), 0.3), "Gates after step 7")
    axes, bar = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == (
        "key-value head", "layer", "Gates after step 7"
    )  # fmt: skip
    assert axes.images[0].get_clim() == (0, 1)
    assert "retrieves" in bar.get_ylabel()
    assert not axes.texts  # 256 numbers are none


@pytest.mark.parametrize("fields", [{"threshold": 1.5}, {"every_num_steps": 0}])
def test_settings_without_meaning_are_refused(fields, tmp_path):
    with pytest.raises(InputError, match=f"{next(iter(fields))}="):
        Gates(**{"folder": str(tmp_path), "threshold": 0.5, "every_num_steps": 1} | fields)
