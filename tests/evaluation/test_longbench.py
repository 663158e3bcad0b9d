from dataclasses import replace
from pathlib import Path

import pytest

from lctrain.errors import InputError
from lctrain.evaluation.generation import Example
from lctrain.evaluation.longbench.questions import read_questions
from lctrain.evaluation.longbench.task import LongBench

PATH = str(Path(__file__).parent / "files/questions.jsonl")
SMALL = {"path": PATH, "prompt": "{context}\n\nQuestion: {input}\nAnswer:", "max_new_tokens": 6}
CASES = {"longbench_qa": ("longbench_qa", {"lengths": [101, 230, 400], **SMALL})}
FIELDS = {
    "path": str(Path(__file__).parent / "files/more_questions.jsonl"), "prompt": "{context}\n{input}",
    "max_new_tokens": 5, "metric": "count", "first_line": True, "chat_template": "default", "num_samples": 3,
}  # fmt: skip
REFUSED = [
    ({"path": "/nowhere.jsonl"}, "/nowhere.jsonl: cannot be read .No such file or directory."),
    ({"prompt": "{question}"}, "longbench prompt: cannot fill in 'question' with input, context"),
    ({"metric": "classification"}, "metric=classification needs all_classes; question-0 has none"),
    ({"lengths": [7, 400]}, "longbench: a length of 7 leaves 1 tokens"),
    ({"path": FIELDS["path"], "chat_template": "default"}, "trec_e is asked without a chat template"),
    ({"chat_template": "tools"}, "chat_template=tools: the tokenizer has default"),
]
TASK = LongBench(
    lengths=[101], sequence_length=101, batch_tokens=None, **SMALL, metric="qa_f1", first_line=False,
    chat_template=None, num_samples=None,
)  # fmt: skip


def prompts(task, tokenizer, length):
    examples = task.examples(tokenizer, ())
    return [each for cell in task.cells(length) for each in examples(cell)]


@pytest.mark.parametrize("length", [101, 102, 230, 400])
def test_the_middle_is_cut_out(tokenizer, length):
    task = replace(TASK, lengths=[length])
    for example, question in zip(prompts(task, tokenizer, length), read_questions(PATH), strict=True):
        text = f"{question['context']}\n\nQuestion: {question['input']}\nAnswer:"
        room = length - 6
        if len(text) + 1 > room:  # bytes and the start token
            half = room // 2
            text = text[: half - 1] + text[-half:]
        assert example.prompt.tolist() == [0, *tokenizer.encode(text, add_special_tokens=False)]
        assert (list(example.references), example.num_tokens) == (question["answers"], 6)


def test_halves_that_grow_are_cut_further(tokenizer):
    text = "é" * 100  # of two bytes each, so that a half that ends inside one has a sign of three bytes in its place
    for length in range(20, 60):
        ids = TASK.ids(tokenizer, text, length)
        assert length - 6 - 8 < len(ids) <= length - 6


def test_a_chat_template_is_whole_and_counted(tokenizer):
    for example in prompts(replace(TASK, chat_template="default"), tokenizer, 101):
        text = tokenizer.decode(example.prompt)
        assert text.startswith(("[user]Passage 1:", "[user]Is the"))
        assert text.endswith("Answer:[assistant]")
        assert 93 <= len(example.prompt) <= 95


def test_the_best_answer_counts():
    example = Example(prompt=[0], references=["a red fox", "fox"], num_tokens=6)
    assert TASK.score("Fox!", example) == 1
    assert TASK.score("fox\nred hen", example) == pytest.approx(0.8)
    assert replace(TASK, first_line=True).score("\n\nfox\nred hen", example) == 1


def test_names_its_metric():
    assert replace(TASK, metric="rouge_l").quantity.metric == "rouge_l"


GOOD = '{"input": "", "context": "", "answers": ["a"], "all_classes": null, "length": 1, "dataset": "x", "_id": "1"}'
MALFORMED = {
    "": "holds no question",
    "{": "line 1: no JSON",
    "[]": "line 1: no JSON object",
    f"{GOOD}\n\n{{}}": "line 3: input must be text",
    GOOD.replace('["a"]', "[]"): "line 1: answers must be a list of texts, at least one",
    GOOD.replace('["a"]', '"a"'): "answers must be a list of texts",
    GOOD.replace("null", '"a"'): "all_classes must be null or a list of texts",
    GOOD.replace('"length": 1, ', ""): "length must be a whole number",
}


@pytest.mark.parametrize("content", MALFORMED)
def test_refuses_a_malformed_file_in_one_line(tmp_path, content):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(InputError, match=MALFORMED[content]) as caught:
        read_questions(str(tmp_path / "q.jsonl"))
    assert "\n" not in str(caught.value)


def test_refuses_what_is_not_utf8(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_questions(str(tmp_path / "q.jsonl"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "f1"}, "no metric 'f1'; choose one of qa_f1, rouge_l"),
        ({"max_new_tokens": 0}, "must be positive"),
        ({"num_samples": 0}, "must be positive"),
    ],
)
def test_refuses_settings(fields, message):
    with pytest.raises(InputError, match=message):
        replace(TASK, **fields)
