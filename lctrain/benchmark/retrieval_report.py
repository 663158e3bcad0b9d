"""The report on what streaming heads cost in recall and perplexity: rows for JSON, a table, a picture per task."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from lctrain.evaluation.base import Result
from lctrain.evaluation.style import COLOURS, tokens

FULL, LEARNED, RANDOM, STREAMING = "full", "learned", "random", "all streaming"
Row = dict[str, Any]


def row(
    label: str, kind: str, share: float, seed: int | None, done: Mapping[str, Result], full: Mapping[str, Result]
) -> Row:
    """Return the row of one arm: recall over all cells, its share of full attention's recall, perplexity by length."""
    recall = {task: recalled(result) for task, result in done.items() if "by_depth" in result}
    whole = {task: recalled(full[task]) for task in recall}
    return {
        "arm": label,
        "kind": kind,
        "share": share,
        "seed": seed,
        "recall": recall,
        "kept": {task: value / whole[task] if whole[task] else None for task, value in recall.items()},
        "perplexity": done["perplexity"]["by_length"] if "perplexity" in done else {},
    }


def recalled(result: Result) -> float:
    """Return the recall over all cells."""
    return fmean(result["by_length"].values())


def table(rows: Sequence[Row]) -> Table:
    """Return a table with a line per kind and share; random heads show the mean, minimum and maximum over the seeds."""
    longest = list(rows[0]["perplexity"])[-1:]
    shown = Table(title="Recall and perplexity by the share of streaming heads", title_justify="left")
    for heading in ("heads", "streaming"):
        shown.add_column(heading)
    for heading in (*rows[0]["recall"], *(f"perplexity at {tokens(int(length))}" for length in longest)):
        shown.add_column(heading, justify="right")
    for (kind, share), grouped in groupby(rows, key=lambda row: (row["kind"], row["share"])):
        group = list(grouped)
        recalls = [spread([each["recall"][task] for each in group], "{:.1%}") for task in rows[0]["recall"]]
        perplexities = [spread([each["perplexity"][length] for each in group], "{:,.2f}") for length in longest]
        shown.add_row(kind, f"{share:.0%}", *recalls, *perplexities)
    return shown


def spread(values: Sequence[float], form: str) -> str:
    """Return one value, or the mean of several followed by their minimum and maximum, as text."""
    mean = form.format(fmean(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def picture(task: str, rows: Sequence[Row]) -> Figure:
    """Draw recall over the share of streaming heads: learned heads as a line, random ones as a band, seeds as dots."""
    figure = Figure(figsize=(8, 4.4))
    axes = figure.subplots()
    recalls = {kind: [(each["share"], each["recall"][task]) for each in rows if each["kind"] == kind]
               for kind in (FULL, LEARNED, RANDOM, STREAMING)}  # fmt: skip
    ends = (recalls[FULL][0], recalls[STREAMING][0])
    for (_, value), label, style in zip(ends, ("full attention", "every head streams"), ("--", ":"), strict=True):
        axes.axhline(value, color="#666666", linestyle=style, linewidth=1.4, label=label)
    axes.plot(
        *zip(ends[0], *recalls[LEARNED], ends[1], strict=True),
        "o-",
        color=COLOURS["after"],
        label="learned heads",
        zorder=3,
    )
    by_share = {share: [value for _, value in group] for share, group in groupby(recalls[RANDOM], key=lambda at: at[0])}
    colour, band = COLOURS["before"], {ends[0][0]: [ends[0][1]], **by_share, ends[1][0]: [ends[1][1]]}
    axes.plot([*band], [fmean(values) for values in band.values()], color=colour, label="random heads, mean")
    axes.fill_between([*band], [*map(min, band.values())], [*map(max, band.values())], color=colour, alpha=0.2, lw=0)
    # Dots are shifted sideways, or equal values would look like one dot.
    dots = [(share + 0.018 * (i - (len(values) - 1) / 2), value) for share, values in by_share.items()
            for i, value in enumerate(values)]  # fmt: skip
    axes.plot(*zip(*dots, strict=True), "o", color=colour, markersize=4, zorder=4, label="random heads, each seed")
    axes.set(xlabel="key-value heads that stream", ylabel=f"{task} recall", xlim=(-0.02, 1.02), ylim=(-0.02, 1.04))
    axes.set_title(f"{task.capitalize()} recall by the share of streaming heads")
    axes.set_xticks(sorted({each["share"] for each in rows}))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure
