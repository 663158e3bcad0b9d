"""All ways to train gates compute the same loss and gradients; what is written is read back. Not how fast they are."""

import json

import pytest
import torch

from lctrain.benchmark.gates import WAYS
from lctrain.benchmark.run import main
from lctrain.config import compose
from lctrain.errors import InputError

DUO = [
    *("attention=duo", "attention.num_sink_tokens=2", "attention.recent_size=6", "attention.initial_gate=0.5"),
    *("tuning=gates", "objective=duo", "lengths=[64]", "num_steps=1", "num_answer_tokens=8"),
]


def run(folder, *overrides):
    main(compose("benchmark", ["what=gates", f"run_dir={folder}", *overrides]))


@pytest.mark.parametrize("memory", ["checkpoint", "auto"])
def test_every_way_has_the_same_loss_and_gradients(tmp_path, capsys, memory):
    run(tmp_path, *DUO, f"memory={memory}")
    rows = json.loads((tmp_path / "gates.json").read_text())["rows"]
    assert [row["way"] for row in rows] == [*WAYS]
    assert [len(row["seconds"]) for row in rows] == [1, 1, 1, 1]
    losses, gradients = [row["loss"] for row in rows], [torch.tensor(row["gradients"]) for row in rows]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    num_gates = gradients[0].numel()
    assert losses[0] > 0.05 * 0.5 * num_gates  # something is to be learned beside λ
    assert (gradients[0] - 0.05).abs().max() > 1e-5
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-7)
    assert "[full; mixed]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "give attention=duo tuning=gates objective=duo"),
        ([*DUO, "objective.loss=logit_kl"], "use objective=duo as it is"),
        ([*DUO, "num_answer_tokens=0"], "num_answer_tokens=0"),
        ([*DUO, "ways=[]"], "ways: an empty list is none of lctrain, dense"),
        ([*DUO, "ways=[dense,mine]"], "ways: mine is none of lctrain, dense"),
    ],
)
def test_refusals(overrides, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()
