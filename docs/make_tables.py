"""Make docs/methods.md, and README's table of choices, from conf/ and from the classes that it names.

Run it after adding, renaming or describing a choice: .venv/bin/python docs/make_tables.py
"""  # noqa: INP001

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import OmegaConf

from lctrain.attention.base import Attention, MaskedAttention
from lctrain.cache.base import CachePolicy
from lctrain.config import conf_dir, groups
from lctrain.evaluation.base import Task

ROOT = Path(__file__).parents[1]
METHODS, README = ROOT / "docs" / "methods.md", ROOT / "README.md"
BEGIN = "<!-- choices: made by docs/make_tables.py; notes in parentheses are written by hand and kept -->"
END = "<!-- -->"
IN_README = ("attention", "cache", "rope", "tuning", "objective", "data", "curriculum", "memory", "logger",
             "evaluation", "strategy", "experiment")  # fmt: skip
HEAD = """# Methods

Made by `docs/make_tables.py` from `conf/` and the docstrings of the classes that it names; a test compares them, so do
not edit this file. A name links to the yaml file with the method's options, and every option is explained there.
"""
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
Cells = Callable[[type[Any]], list[str]]


def attention(cls: type[Attention]) -> list[str]:
    learns = cls.child is not Attention.child if cls.learns is Attention.learns else None
    decodes = True if cls.can_decode is Attention.can_decode else None
    static = issubclass(cls, MaskedAttention) and (cls.attend is MaskedAttention.attend or None)
    return list(map(answer, (static, learns, decodes, cls.supports_sequence_parallel)))


def cache(cls: type[CachePolicy]) -> list[str]:
    return ["full" if cls.decides else "any", answer(not cls.forgets_between_forwards)]


def evaluation(cls: type[Task]) -> list[str]:
    quantity = cls.quantity
    return ["by its options" if isinstance(quantity, property) else f"{quantity.metric}, {quantity.unit}"]


ATTENTION = """What a model computes in place of full attention. A *static pattern* is one function of positions, which
every kernel runs. A method that *learns* trains with the model and is exported with it; one that learns nothing adds
nothing to the model, and runs on any without training. One that *decodes* can be evaluated by writing, and be served.
Under *sequence parallel* several devices share each row. *Option*: the method's options decide."""
CACHE = """What a model keeps of the text while it reads and writes (`lctrain evaluate`, `lctrain.model.serve`). No
policy learns. One that needs *full* attention decides itself what is seen. *Any chunks*: the result does not depend on
`prefill_chunk_size`."""
TABLES: dict[str, tuple[str, list[str], Cells]] = {
    "attention": (ATTENTION, ["static pattern", "learns", "decodes", "sequence parallel"], attention),
    "cache": (CACHE, ["attention", "any chunks"], cache),
    "rope": ("How rotary positions are stretched. transformers computes all of them.", [], lambda cls: []),
    "tuning": ("What trains. A method's own parameters always train, unless nothing does.", [], lambda cls: []),
    "evaluation": ("What is measured, at several lengths.", ["metric, unit"], evaluation),
}


def answer(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "option"}[value]


def methods() -> str:
    """Return the text of docs/methods.md."""
    return "\n".join([HEAD, *(line for group in TABLES for line in table(group)), ""]).rstrip() + "\n"


def table(group: str) -> Iterator[str]:
    """Yield the section of one config group, line by line."""
    about, columns, cells = TABLES[group]
    yield from (f"## {group}", about, "")
    head = ["name", "what", *(["sets"] if group == "tuning" else []), "papers", *columns]
    yield from (f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}")
    for name in choices(group):
        yield f"| {' | '.join(row(group, name, len(columns), cells))} |"
    yield ""


def row(group: str, name: str, num_columns: int, cells: Cells) -> list[str]:
    path = conf_dir() / group / f"{name}.yaml"
    text, config = path.read_text(), OmegaConf.to_container(OmegaConf.load(path))
    comment = re.match(r"# (.*)\n", text)
    link, cls = f"[{name}](../conf/{group}/{name}.yaml)", target(config)
    said = comment[1] if comment else ""
    if cls is None:  # a choice of other choices, or of nothing
        others = [f"`{each}`" for each in config.get("defaults", []) if isinstance(each, str) and each != "_self_"]
        what = f"{cited(said)} Measures {', '.join(others) or 'nothing'}.".strip()
        return [link, what, papers([said]), *[""] * num_columns]
    sources = [said, inspect.getdoc(cls) or "", sys.modules[cls.__module__].__doc__ or ""]
    sets = [settings(config)] if group == "tuning" else []
    return [link, cited(said or sentence(sources[1])), *sets, papers(sources), *cells(cls)]


def target(config: Mapping[str, Any]) -> type[Any] | None:
    """Return the class that a yaml file names, at its top or one level below."""
    for node in (config, *config.values()):
        if isinstance(node, dict) and "_target_" in node:
            return get_class(node["_target_"])
    return None


def settings(config: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in config.items() if name != "_target_").replace("'", "")


def sentence(docstring: str) -> str:
    """Return the first sentence of a docstring."""
    return re.split(r"(?<=\.)\s(?=[A-Z`])", " ".join(docstring.split("\n\n", maxsplit=1)[0].split()))[0]


def cited(what: str) -> str:
    """Return a sentence without the paper in parentheses, which has a column of its own."""
    return re.sub(r" \([^()]*arXiv:[^()]*\)", "", what).replace("|", r"\|")


def papers(sources: list[str]) -> str:
    """Return links to the papers that the first of the sources with any names."""
    found = next((ids for source in sources if (ids := list(dict.fromkeys(ARXIV.findall(source))))), [])
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in found)


def choices(group: str) -> list[str]:
    """Return the names of a group's choices: the default, then the others by name."""
    default, names = (groups("evaluate") | groups("train"))[group]
    return sorted(names, key=lambda name: (name != default, name))


def readme(text: str) -> str:
    """Return README's text with the table of choices made anew; notes in parentheses stay as they are."""
    before, old, after = re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", text)
    kept = dict(re.findall(r"^\| (`\w+`.*?) \| (.*) \|$", old, re.MULTILINE))
    labels = {re.findall(r"\w+", label)[0]: label for label in kept}
    rows = []
    for group in IN_README:
        label = labels.get(group, f"`{group}`")
        notes = dict(re.findall(r"(\w+)( \([^)]*\))", kept.get(label, "")))
        rows.append(f"| {label} | {', '.join(name + notes.get(name, '') for name in choices(group))} |")
    return f"{before}{BEGIN}\n| group | choices |\n| --- | --- |\n" + "\n".join(rows) + f"\n{END}{after}"


def main() -> None:
    METHODS.write_text(methods())
    README.write_text(readme(README.read_text()))


if __name__ == "__main__":
    main()
