from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lctrain.errors import InputError
from lctrain.evaluation.journal import Journal
from lctrain.evaluation.needle import Needle
from lctrain.evaluation.passkey import Passkey
from lctrain.evaluation.perplexity import Perplexity
from lctrain.evaluation.reader import Reader
from lctrain.evaluation.run import documents, evaluate

CONF = Path(__file__).parents[2] / "conf"
TASKS = {
    "perplexity": Perplexity(
        lengths=[64], sequence_length=64, batch_tokens=None, num_tokens=64, stride=None, num_buckets=2
    ),
    "passkey": Passkey(
        lengths=[150], sequence_length=150, batch_tokens=None, depths=[0.5], num_trials=1, heldout=True,
        chat_template=None, seed=0, num_digits=3,
    ),
}  # fmt: skip


def test_runs_every_task(reader, data):
    results = evaluate(reader, data, TASKS, Journal(), progress=False)
    assert list(results) == ["perplexity", "passkey"]
    assert results["perplexity"]["by_length"]["64"] > 1


def test_no_tasks_no_results(reader, data):
    assert evaluate(reader, data, {}, Journal(), progress=False) == {}


def test_checks_every_task_before_the_first(tokenizer, data, documents):
    data.heldout_documents = lambda: documents[3:4]
    with pytest.raises(InputError, match="passkey"):
        evaluate(Reader(model=None, tokenizer=tokenizer), data, TASKS, Journal(), progress=False)


def test_a_task_reads_held_out_text_or_all(data):
    assert len(documents(TASKS["passkey"], data)) == 5
    assert len(documents(replace(TASKS["passkey"], heldout=False), data)) == 7


def test_what_was_measured_under_a_label_is_not_measured_again(reader, data, tokenizer):
    journal = Journal()
    results = evaluate(reader, data, TASKS, journal, label="after", progress=False)
    num_cells = len(journal.measured)
    assert evaluate(reader, data, TASKS, journal, label="after", progress=False) == results
    assert len(journal.measured) == num_cells == 2
    evaluate(reader, data, TASKS, journal, label="before", progress=False)
    assert len(journal.measured) == 4


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("perplexity", {"perplexity": Perplexity}),
        ("passkey", {"passkey": Passkey}),
        ("single_needle", {"needle": Needle}),
        ("needle", {"needle": Needle, "passkey": Passkey}),
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
