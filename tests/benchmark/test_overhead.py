"""The comparison runs, is fair, and leaves its numbers; how fast is not for a test."""

import json

import pytest

from lctrain.benchmark.run import main
from lctrain.config import compose
from lctrain.errors import InputError

SMALL = [
    "num_steps=2",
    "num_repeats=1",
    "sequence_length=128",
    "datamodule.micro_batch_size=1",
    "datamodule.num_heldout_tokens=128",
    "model=scratch",
    "model.architecture={model_type: llama, num_hidden_layers: 1, hidden_size: 32, num_attention_heads: 4}",
    "data=text",
]


@pytest.fixture
def overrides(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.txt").write_text(f"number {number} of many\n" * 40)
    where = [f"run_dir={tmp_path / 'run'}", f"data.path={corpus}", f"datamodule.cache_dir={tmp_path / 'cache'}"]
    return [*SMALL, *where]


def test_both_compute_the_same_and_the_rates_are_written(overrides, tmp_path, capsys):
    main(compose("benchmark", overrides))
    result = json.loads((tmp_path / "run" / "overhead.json").read_text())
    rates = result["tokens_per_second"]
    assert result["ratio"] == rates["lctrain"] / rates["plain"] > 0
    assert result["first_loss"]["lctrain"] == pytest.approx(result["first_loss"]["plain"], rel=1e-5)
    assert {name: len(values) for name, values in result["repeats"].items()} == {"lctrain": 1, "plain": 1}
    assert "of the plain loop" in capsys.readouterr().out
    with pytest.raises(InputError, match="choose another run_dir"):
        main(compose("benchmark", overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [("what=overhaed", "did you mean 'overhead'"), ("num_steps=0", "num_steps=0"), ("num_repeats=x", "num_repeats=x")],
)
def test_refusals(override, message, tmp_path):
    with pytest.raises(InputError, match=message):
        main(compose("benchmark", [f"run_dir={tmp_path / 'run'}", override]))
    assert not (tmp_path / "run").exists()
