"""What holds for every task: the tasks are those of conf/evaluation, at the sizes that their own test files declare."""

import json
import math
import runpy
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from lctrain.config import compose, conf_dir
from lctrain.errors import InputError
from lctrain.evaluation.base import Task
from lctrain.evaluation.generation import Generation
from lctrain.evaluation.journal import Journal
from lctrain.evaluation.reader import Reader
from lctrain.evaluation.run import evaluate

BESIDE = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
CASES, FIELDS, REFUSED = BESIDE["CASES"], BESIDE["FIELDS"], BESIDE["REFUSED"]
YAMLS = sorted(path.stem for path in (conf_dir() / "evaluation").glob("*.yaml"))


@dataclass(frozen=True, kw_only=True)
class Recorder(Reader):
    """A reader that keeps what it was asked and what it replied."""

    asked: list = field(default_factory=list)
    replies: list = field(default_factory=list)

    def complete(self, prompts, num_tokens):
        self.asked.append([(tuple(prompt.tolist()), n) for prompt, n in zip(prompts, num_tokens, strict=True)])
        replies = self.reply(prompts, num_tokens)
        self.replies.append(list(replies))
        return replies

    def reply(self, prompts, num_tokens):
        return super().complete(prompts, num_tokens)


class Parrot(Recorder):
    """A reader that replies with the same text to everything."""

    def reply(self, prompts, num_tokens):
        return ["\nParagraph 1: on red sofa the four sport weather a blue stone\nTamsel"] * len(prompts)


@pytest.fixture
def run(data, reader, tmp_path):
    """Measures a task as `lctrain evaluate` does."""

    def measured(task, by=None, journal=None):
        return evaluate(by or reader, data, {"task": task}, journal or Journal(), progress=False)["task"]

    return measured


@pytest.fixture
def record(model, tokenizer):
    """Makes readers that keep what they are asked."""
    return lambda kind=Recorder, **changes: kind(model=model, tokenizer=tokenizer, **changes)


def built(yaml):
    """The tasks of a file of conf/evaluation, with what it leaves open filled in as in its case."""
    given = {name: fields for name, (of, fields) in CASES.items() if of == yaml}
    cfg = compose("evaluate", ["model.path=x", f"evaluation={yaml}", "sequence_length=4096"])
    for task, settings in (cfg.evaluation or {}).items():
        for name in (name for name in settings if OmegaConf.is_missing(settings, name)):
            settings[name] = given[task][name]
    return instantiate(cfg.evaluation, _convert_="all")


def test_the_tasks_here_are_those_of_conf(task_of):
    groups = [OmegaConf.load(conf_dir() / "evaluation" / f"{yaml}.yaml") for yaml in YAMLS]
    targets = {settings["_target_"] for group in groups for settings in group.values() if "_target_" in settings}
    assert {get_class(target) for target in targets} == {type(task_of(name)) for name in CASES}


@pytest.mark.parametrize("yaml", YAMLS)
def test_lengths_follow_the_sequence_length(yaml):
    for task in built(yaml).values():
        assert isinstance(task, Task)
        assert task.context_lengths == (512, 1024, 2048, 4096)


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_task_goes_on_with_the_next_cell(task_of, run, record, tmp_path, name):
    task, first = task_of(name), record()
    whole = run(task, first, Journal(tmp_path / "whole"))
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    assert len(lines) > 2
    (tmp_path / "stopped").write_text("".join(lines[:2]))
    rest = record()
    assert run(task, rest, Journal(tmp_path / "stopped")) == whole
    assert (tmp_path / "stopped").read_text() == "".join(lines)
    assert rest.asked == first.asked[len(first.asked) - len(rest.asked) :]
    assert len(rest.asked) < len(first.asked) or not isinstance(task, Generation)
    done = record()
    assert run(task, done, Journal(tmp_path / "stopped")) == whole
    assert not done.asked


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_batch_are_read_as_if_alone(task_of, run, record, name):
    longest = task_of(name).context_lengths[-1]
    alone, together = record(), record()
    results = [run(task_of(name, batch_tokens=size * longest), by) for size, by in ((1, alone), (8, together))]
    assert results[0]["by_length"] == pytest.approx(results[1]["by_length"], rel=1e-5)
    asked, replies = (
        [[each for batch in getattr(by, what) for each in batch] for by in (alone, together)]
        for what in ("asked", "replies")
    )
    assert asked[0] == asked[1]
    assert replies[0] == replies[1]
    assert len(together.asked) < len(alone.asked) or not asked[0]


@pytest.mark.parametrize("name", CASES)
def test_no_task_reads_past_its_length(task_of, run, record, name):
    task, by = task_of(name), record()
    run(task, by)
    for batch in by.asked:
        for prompt, num_tokens in batch:
            assert len(prompt) + num_tokens - 1 <= task.context_lengths[-1]  # the last token is not read


@pytest.mark.parametrize("name", CASES)
def test_the_references_are_right_and_nothing_is_wrong(task_of, data, tokenizer, name):
    task = task_of(name)
    if isinstance(task, Generation):
        examples = task.examples(tokenizer, task.documents(data))
        made = [each for length in task.context_lengths for cell in task.cells(length) for each in examples(cell)]
        assert len(made) == len(task.context_lengths) * task.num_examples
        for example in made:
            replies = (" and ".join(example.references), example.references[0])  # all are wanted, or one is enough
            assert max(task.score(reply, example) for reply in replies) == 1
            assert task.score("", example) == 0


@pytest.mark.parametrize("name", CASES)
def test_results_are_numbers(task_of, run, name):
    task = task_of(name)
    result = run(task)
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(result, allow_nan=False))
    assert (result.pop("metric"), result.pop("unit")) == (task.quantity.metric, task.quantity.unit)
    assert list(result["by_length"]) == [str(length) for length in task.context_lengths]
    assert all(math.isfinite(number) for number in leaves(result))
    for length, (low, high) in result.get("interval", {}).items():
        assert 0 <= low <= result["by_length"][length] <= high <= 1


def leaves(node):
    """The numbers of a result; anything else fails."""
    if isinstance(node, dict | list | tuple):
        for child in node.values() if isinstance(node, dict) else node:
            yield from leaves(child)
    else:
        assert isinstance(node, int | float)
        yield node


@pytest.mark.parametrize("name", CASES)
def test_progress_adds_up(task_of, data, reader, name):
    task, units, cells = task_of(name), [], {}

    def once(cell, num_units, measure):
        cells[cell] = num_units
        return measure()

    task.run(reader, task.documents(data), once, lambda _, num_units: units.append(num_units))
    assert sum(units) == pytest.approx(task.num_units())
    assert sum(cells.values()) == pytest.approx(task.num_units())


@pytest.mark.parametrize(
    ("name", "changes", "message"), [(name, *refusal) for name, refusals in REFUSED.items() for refusal in refusals]
)
def test_refuses_before_anything_is_loaded(task_of, run, tokenizer, name, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        run(task_of(name, **changes), Reader(model=None, tokenizer=tokenizer))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_all_changed(task_of, name):
    own = {each.name for each in fields(task_of(name))} - {"lengths", "sequence_length", "batch_tokens"}
    assert set(FIELDS[name]) == own


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in FIELDS for field in FIELDS[name]])
def test_every_field_changes_something(task_of, run, record, name, field):
    def told(**changes):
        by = record(Parrot)
        return run(task_of(name, **changes), by), by.asked

    assert told(**{field: FIELDS[name][field]}) != told()
