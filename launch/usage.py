"""Help texts, built from the verbs' docstrings and from conf/, so that they stay up to date."""

import importlib
import re
import textwrap

from lctrain import config

HYDRAS_FLAGS = re.compile(  # any other flag would make Hydra print its own long usage
    r"-(-(cfg|package|resolve|multirun|run|info|config-(path|name|dir)|hydra-help|shell-completion|experimental-rerun"
    r"|version)|[cpmri]|c[pnd]|sc)(=.*)?"
)
VERBS = ("train", "evaluate", "export", "plan", "benchmark", "submit", "status", "cancel")


def overview() -> str:
    verbs = "\n".join(f"  {verb:<10} {_doc(verb).splitlines()[0]}" for verb in VERBS)
    return f"""lctrain adapts a pretrained causal language model to a longer context and proves that it uses it.

usage: lctrain VERB [group=choice …] [option=value …]

{verbs}

  lctrain VERB --help    what the verb does, its groups and options
  lctrain --version

  lctrain train experiment=demo run_dir=runs/demo
  lctrain train model.path=<folder or hub id> sequence_length=32768 attention=shifted_sparse rope=yarn tuning=longlora

exit codes: 0 done; 2 the input was wrong (one line says what); 75 stopped on request, a checkpoint is written;
1 anything else"""


def usage(verb: str) -> str:
    groups = "\n".join(_group(name, *choices) for name, choices in config.groups(verb).items())
    text = (config.conf_dir() / f"{verb}.yaml").read_text()
    options = re.sub(r"^(defaults|hydra):.*\n(?:[ -].*\n)*", "", text, flags=re.MULTILINE).strip()
    return f"""{_doc(verb)}
{groups and f"{chr(10)}groups (choose with group=choice; * is the default):{chr(10)}{groups}{chr(10)}"}
options (set with option=value):
{textwrap.indent(options, "  ")}

more:
  lctrain {verb} … --cfg job                         the composed config; with --package GROUP one part of it
  lctrain {verb} … --multirun option=1,2,3           a run for each; with run_dir='runs/sweep/${{hydra:job.num}}'
  lctrain {verb} … --config-dir FOLDER               your own yaml files beside those of lctrain"""


def _doc(verb: str) -> str:
    return (importlib.import_module(f"launch.{verb}").__doc__ or "").strip()


def _group(name: str, default: str | None, choices: list[str]) -> str:
    marked = "  ".join(f"{choice}*" if choice == default else choice for choice in choices)
    return textwrap.fill(f"{name:<20} {marked}", 100, initial_indent="  ", subsequent_indent=" " * 23)
