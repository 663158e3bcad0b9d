"""Pictures of an evaluation: scores and perplexity by length, perplexity by position, recall by depth, loss by step."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from lctrain.evaluation import recall_pictures
from lctrain.evaluation.base import Result
from lctrain.evaluation.style import COLOURS, STYLE, tokens

Results = Mapping[str, Mapping[str, Result]]
"""Label (before, after) → task → result, as `evaluate` returns it."""
Row = Mapping[str, Any]


def draw(folder: Path, results: Results, history: Sequence[Row] = ()) -> list[Path]:
    """Write a PNG for each picture that has data, and return the files."""
    with rc_context(STYLE):
        figures = dict(_figures(results, history))
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def _figures(results: Results, history: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """Yield each figure with the name of its file."""
    for task in dict.fromkeys(task for done in results.values() for task in done):
        of = {label: done[task] for label, done in results.items() if task in done}
        if any("by_position" in result for result in of.values()):
            yield f"{task}_by_length", perplexity_by_length(of)
            yield f"{task}_by_position", perplexity_by_position(of)
        if any("by_depth" in result for result in of.values()):
            yield from ((f"{task}_{file_name(label)}", recall_pictures.heatmap(task, label, of[label])) for label in of)
            yield f"{task}_by_depth", recall_pictures.by_depth(task, of)
        elif any("interval" in result for result in of.values()):
            yield f"{task}_by_length", score_by_length(task, of)
    if history:
        yield "training", training(history)


def file_name(label: str) -> str:
    """Return the label with every character that is special in shells and links replaced."""
    return re.sub(r"\W+", "_", label).strip("_")


def perplexity_by_length(results: Mapping[str, Result]) -> Figure:
    """Draw one line per label on logarithmic axes; with at most two lines, each point shows its number."""
    figure = Figure(figsize=(7, 4.4))
    axes = figure.subplots()
    lengths: list[int] = []
    for i, (label, result) in enumerate(results.items()):
        others = [other["by_length"] for name, other in results.items() if name != label]
        lengths, values = [int(length) for length in result["by_length"]], list(result["by_length"].values())
        axes.plot(lengths, values, marker="o", markersize=7, label=label, color=COLOURS.get(label))
        for length, y in result["by_length"].items() if len(results) <= 2 else ():
            lower = any(y < other[length] or (y == other[length] and i) for other in others if length in other)
            number = f"{y:#.3g}" if y < 100 else f"{y:,.0f}"
            place = (0, -16 if lower else 8)
            axes.annotate(
                number, (int(length), y), place, textcoords="offset points", ha="center", color=COLOURS.get(label)
            )
    token_ticks(axes, lengths, logarithmic=True)
    perplexity_axis(axes)
    axes.set(title="Perplexity by context length", xlabel="context length (tokens)")
    axes.legend()
    return figure


def score_by_length(task: str, results: Mapping[str, Result]) -> Figure:
    """Draw one line per label, from 0 to 100 %, with the 95 % interval at each length."""
    figure = Figure(figsize=(7, 4.4))
    axes = figure.subplots()
    lengths: list[int] = []
    for label, result in results.items():
        lengths, values = [int(length) for length in result["by_length"]], np.array([*result["by_length"].values()])
        low, high = np.array([result["interval"][str(length)] for length in lengths]).T
        axes.errorbar(lengths, values, (values - low, high - values), fmt="o-", capsize=4, label=label,
                      color=COLOURS.get(label), clip_on=False)  # fmt: skip
        axes.set(title=f"{task} by context length", xlabel="context length (tokens)", ylabel=result["metric"])
    token_ticks(axes, lengths, logarithmic=True)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend()
    return figure


def perplexity_by_position(results: Mapping[str, Result]) -> Figure:
    """Draw perplexity over the position inside the longest window, which shows up to where a model predicts well."""
    figure = Figure(figsize=(7, 4.4))
    axes = figure.subplots()
    end = 0
    for label, result in results.items():
        ranges = result["by_position"]
        end = ranges["end"][-1]
        axes.stairs(ranges["perplexity"], [*ranges["start"], end], label=label, baseline=None, linewidth=2.2,
                    color=COLOURS.get(label))  # fmt: skip
    token_ticks(axes, [end * i // 8 for i in range(9)])
    perplexity_axis(axes)
    axes.set(title=f"Perplexity inside a window of {tokens(end)} tokens", xlabel="position in the window (tokens)")
    axes.set_xlim(0, end)
    axes.legend()
    return figure


def training(history: Sequence[Row]) -> Figure:
    """Draw loss (above) and sequence length (below) over optimizer steps; rows without a value are left out."""
    figure = Figure(figsize=(7, 5))
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    steps, losses = column(history, "loss")
    top.plot(steps, losses, color=COLOURS["after"], linewidth=0.9, alpha=0.35)
    top.plot(steps, smooth(losses), color=COLOURS["after"])
    top.set(title="Training", ylabel="loss (nats per token)")
    steps, lengths = column(history, "sequence_length")
    bottom.step(steps, lengths, where="post", color=COLOURS["before"])
    bottom.fill_between(steps, lengths, step="post", color=COLOURS["before"], alpha=0.25, linewidth=0)
    bottom.set_yticks(sorted(set(lengths)), [tokens(int(length)) for length in sorted(set(lengths))])
    bottom.set(xlabel="optimizer step", ylabel="length (tokens)", ylim=(0, None))
    figure.align_ylabels()
    return figure


def column(history: Iterable[Row], name: str) -> tuple[list[float], list[float]]:
    """Return the steps and the values of one quantity."""
    rows = [(float(row["step"]), float(row[name])) for row in history if row.get(name) not in (None, "")]
    return [step for step, _ in rows], [value for _, value in rows]


def smooth(values: Sequence[float]) -> list[float]:
    """Return the running mean over about a twentieth of the run, over fewer values at the ends."""
    half = max(1, len(values) // 40)
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def perplexity_axis(axes: Axes) -> None:
    """Make the axis logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    axes.set_yscale("log", subs=[])
    axes.set_ylabel("perplexity (log scale)")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.2, high * 1.2)  # room for the numbers
    low, high = axes.get_ylim()
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))))
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def token_ticks(axes: Axes, ticks: Sequence[int], *, logarithmic: bool = False) -> None:
    """Set the ticks of the x axis to these numbers of tokens."""
    if logarithmic:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [tokens(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
