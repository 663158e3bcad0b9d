from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lctrain.errors import InputError
from lctrain.evaluation.passkey import Passkey
from lctrain.evaluation.perplexity import Perplexity
from lctrain.evaluation.run import evaluate

CONF = Path(__file__).parents[2] / "conf"
TASKS = {
    "perplexity": Perplexity(lengths=[64], sequence_length=64, num_tokens=64, stride=None, num_buckets=2),
    "passkey": Passkey(lengths=[150], sequence_length=150, depths=[0.5], num_trials=1, num_digits=3, seed=0),
}


def test_runs_every_task(model, tokenizer, documents):
    results = evaluate(model, tokenizer, documents, TASKS, progress=False)
    assert list(results) == ["perplexity", "passkey"]
    assert results["perplexity"]["by_length"]["64"] > 1


def test_no_tasks_no_results(model, tokenizer):
    assert evaluate(model, tokenizer, [], {}, progress=False) == {}


def test_checks_every_task_before_the_first(documents):
    with pytest.raises(InputError, match="passkey"):
        evaluate(None, None, documents[3:4], TASKS, progress=False)


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("perplexity", {"perplexity": Perplexity}),
        ("passkey", {"passkey": Passkey}),
        ("default", {"perplexity": Perplexity, "passkey": Passkey}),
        ("none", {}),
    ],
)
def test_configs(name, tasks):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        group = compose(overrides=[f"+evaluation={name}"]).get("evaluation", {})
    config = OmegaConf.create({"sequence_length": 4096, "seed": 7, "evaluation": group})
    built = instantiate(config.evaluation, _convert_="all")
    assert {task: type(made) for task, made in built.items()} == tasks
    assert all(made.context_lengths == (512, 1024, 2048, 4096) for made in built.values())
