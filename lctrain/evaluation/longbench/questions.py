"""Read a file of LongBench's questions, and refuse one that is malformed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lctrain.errors import InputError

Question = dict[str, Any]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input": (lambda value: isinstance(value, str), "text"),
    "context": (lambda value: isinstance(value, str), "text"),
    "answers": (lambda value: _is_texts(value) and len(value) > 0, "a list of texts, at least one"),
    "all_classes": (lambda value: value is None or _is_texts(value), "null or a list of texts"),
    "length": (lambda value: isinstance(value, int), "a whole number"),
    "dataset": (lambda value: isinstance(value, str), "text"),
    "_id": (lambda value: isinstance(value, str), "text"),
}


def read_questions(path: str) -> list[Question]:
    """Return the questions of a JSONL file. Raises InputError that names the line and the field that is wrong."""
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"{file}: cannot be read ({reason}); give a JSONL file of LongBench's") from error
    questions = [_question(line, f"{file}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise InputError(f"{file}: holds no question")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        question = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: no JSON ({error.msg})") from error
    if not isinstance(question, dict):
        raise InputError(f"{where}: no JSON object")
    for name, (fits, what) in FIELDS.items():
        if name not in question or not fits(question[name]):
            raise InputError(f"{where}: {name} must be {what}")
    return question
