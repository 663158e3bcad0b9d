"""The report of a run: report.json, pictures, a table on the console, and the same in W&B."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

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


def rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the table's headings and cells: a row per length, a column per task and label."""
    columns = [
        (f"{task} {label}", "{:.0%}" if "by_depth" in done[task] else "{:,.2f}", done[task]["by_length"])
        for task in task_names(results)
        for label, done in results.items()
    ]
    lengths = sorted({int(length) for _, _, values in columns for length in values})
    cells = [
        [tokens(n), *(form.format(values[str(n)]) if str(n) in values else "-" for _, form, values in columns)]
        for n in lengths
    ]
    return ["length", *(heading for heading, _, _ in columns)], cells


def table(results: Results) -> Table:
    """Return a table for a rich console: a row per length, labels side by side."""
    headings, cells = rows(results)
    shown = Table(title="Before and after" if len(results) > 1 else None, title_style="bold", title_justify="left")
    for heading in headings:
        style = "bold" if heading.endswith("after") else None
        shown.add_column(heading.replace(" ", "\n", 1), justify="right", style=style)
    for row in cells:
        shown.add_row(*row)
    return shown


def log_media(run: "wandb.Run", folder: Path, results: Results) -> None:
    """Log the table, and the pictures that `write_report` wrote into `folder`, to a W&B run."""
    import wandb  # needed only if W&B is the logger

    headings, cells = rows(results)
    images = {f"evaluation/{path.stem}": wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))}
    tables = {"by_length": wandb.Table(columns=[*headings], data=cells)}
    if recalled := recall_cells(results):
        tables["by_cell"] = wandb.Table(columns=["label", "task", "length", "depth", "recalled"], data=recalled)
    run.log({**{f"evaluation/{name}": table for name, table in tables.items()}, **images})


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
