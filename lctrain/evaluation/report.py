"""The report of a run: report.json, pictures, a table on the console, and the same in W&B."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from lctrain.evaluation.base import SHARE
from lctrain.evaluation.pictures import Results, Row, draw
from lctrain.evaluation.style import tokens

if TYPE_CHECKING:
    import wandb

PACKAGES = ("lctrain", "torch", "transformers", "lightning", "peft", "datasets", "deepspeed")


def write_report(
    folder: Path,
    results: Results,
    *,
    config: Mapping[str, Any],
    steps: int = 0,
    tokens_per_second: float | None = None,
    history: Sequence[Row] = (),
) -> dict[str, Any]:
    """Write report.json and the pictures into `folder` and return the report.

    `results` maps a label (before, after) to the results of `evaluate`; the report holds task → label → length → value,
    and under `details` everything that was measured. `history` has a row per logged step: step, loss, sequence_length.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        **{task: {label: done[task]["by_length"] for label, done in results.items()} for task in task_names(results)},
        "tokens_per_second": tokens_per_second,
        "steps": steps,
        "versions": versions(),
        "config": config,
        "details": results,
    }
    draw(folder, results, history)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def task_names(results: Results) -> list[str]:
    """Return the name of every task that ran, in order."""
    return list(dict.fromkeys(task for done in results.values() for task in done))


class Column(NamedTuple):
    """The main numbers of one task under one label."""

    task: str
    label: str
    unit: str
    by_length: Mapping[str, float]

    def text(self, length: int) -> str:
        """Return the number at one length as a table on the console shows it."""
        value = self.by_length.get(str(length))
        if value is None:
            return "-"
        return f"{100 * value:.3g}%" if self.unit == SHARE else f"{value:,.2f}"


def columns(results: Results) -> tuple[list[int], list[Column]]:
    """Return all lengths, and a column per task and label, labels side by side."""
    found = [
        Column(task, label, done[task].get("unit", ""), done[task]["by_length"])
        for task in task_names(results)
        for label, done in results.items()
    ]
    return sorted({int(length) for column in found for length in column.by_length}), found


def table(results: Results) -> Table:
    """Return a table for a rich console: a row per length, shares in percent."""
    lengths, found = columns(results)
    shown = Table(title="Before and after" if len(results) > 1 else None, title_style="bold", title_justify="left")
    shown.add_column("length", justify="right")
    for column in found:
        style = "bold" if column.label.endswith("after") else None
        shown.add_column(f"{column.task}\n{column.label}", justify="right", style=style)
    for length in lengths:
        shown.add_row(tokens(length), *(column.text(length) for column in found))
    return shown


def log_media(run: "wandb.Run", folder: Path, results: Results) -> None:
    """Log to a W&B run: each result as evaluation/task/label/length, all of them as a table, and the pictures that
    `write_report` wrote into `folder`.
    """
    import wandb  # needed only if W&B is the logger

    lengths, found = columns(results)
    headings: list[str | int] = [
        "length (tokens)",
        *(f"{column.task} {column.label} ({column.unit})" for column in found),
    ]
    rows = [[length, *(column.by_length.get(str(length)) for column in found)] for length in lengths]
    images = {f"evaluation/{path.stem}": wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))}
    tables = {"by_length": wandb.Table(columns=headings, data=rows)}
    if recalled := recall_cells(results):
        tables["by_cell"] = wandb.Table(columns=["label", "task", "length", "depth", "recalled"], data=recalled)
    run.log({**numbers(results), **{f"evaluation/{name}": table for name, table in tables.items()}, **images})


def numbers(results: Results) -> dict[str, float]:
    """Return each result under evaluation/task/label/length."""
    return {
        f"evaluation/{column.task}/{column.label}/{length}": value
        for column in columns(results)[1]
        for length, value in column.by_length.items()
    }


def recall_cells(results: Results) -> list[list[Any]]:
    """Return label, task, length, depth and share of every cell of recall."""
    return [
        [label, task, int(length), float(depth), share]
        for label, done in results.items()
        for task, result in done.items()
        for length, row in result.get("by_depth", {}).items()
        for depth, share in row.items()
    ]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that influence the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra, or lctrain itself, is not installed
            continue
    return found
