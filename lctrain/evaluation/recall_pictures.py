"""Pictures of recall: a heatmap of depth over length, and a curve over depth."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lctrain.evaluation.base import Result
from lctrain.evaluation.style import COLOURS, tokens

CELL = (0.62, 0.36)  # inches of one cell: large enough for a number
MOST = (11.0, 7.0)  # inches of all cells together, at most


def heatmap(task: str, label: str, result: Result) -> Figure:
    """Draw recall, from 0 to 100 %, by depth and length; each cell shows its number where it fits."""
    grid: Mapping[str, Mapping[str, float]] = result["by_depth"]
    lengths, depths = list(grid), list(next(iter(grid.values())))
    shares = np.array([list(row.values()) for row in grid.values()]).T
    width, height = min(CELL[0] * len(lengths), MOST[0]), min(CELL[1] * len(depths), MOST[1])
    figure = Figure(figsize=(max(width, 1.5) + 2.3, max(height, 2.4) + 1.2))
    axes = figure.subplots()
    cells = axes.pcolormesh(shares, vmin=0, vmax=1, cmap="YlGnBu", edgecolors="white", linewidth=0.5)
    if width >= CELL[0] * len(lengths) and height >= CELL[1] * len(depths):
        for (y, x), share in np.ndenumerate(shares):
            colour = "white" if share > 0.6 else "#222222"
            axes.text(x + 0.5, y + 0.5, f"{share:.0%}", ha="center", va="center", fontsize=10, color=colour)
    axes.invert_yaxis()
    across, down = (range(0, n, -(-n // most)) for n, most in ((len(lengths), 16), (len(depths), 20)))
    axes.set_xticks([i + 0.5 for i in across], [tokens(int(lengths[i])) for i in across])
    axes.set_yticks([i + 0.5 for i in down], [f"{float(depths[i]):.0%}" for i in down])
    axes.set(xlabel="context length (tokens)", ylabel="depth (0% = start)")
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    figure.suptitle(f"{task.capitalize()} recall, {label}", fontweight="bold", x=0.01, ha="left")
    figure.colorbar(cells, ax=axes, format=PercentFormatter(1), label=f"recalled of {trials(result)} a cell", pad=0.03)
    return figure


def trials(result: Result) -> int:
    """Return the number of trials per cell."""
    return int(result["num_examples"]) // len(next(iter(result["by_depth"].values())))


def by_depth(task: str, results: Mapping[str, Result]) -> Figure:
    """Draw recall over depth: for one label a line per length (at most ten), else a line per label over all lengths."""
    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    grids = {label: result["by_depth"] for label, result in results.items()}
    if len(grids) == 1:
        ((label, grid),) = grids.items()
        chosen = [list(grid)[i] for i in np.linspace(0, len(grid) - 1, min(len(grid), 10)).astype(int)]
        shades = colormaps["viridis_r"](np.linspace(0.1, 1, len(chosen)))
        lines = {tokens(int(n)): (grid[n], shade) for n, shade in zip(chosen, shades, strict=True)}
        title, legend = f"{task.capitalize()} recall by depth, {label}", "length (tokens)"
    else:
        lines = {label: (mean(grid), COLOURS.get(label)) for label, grid in grids.items()}
        title, legend = f"{task.capitalize()} recall by depth, all lengths", None
    for name, (row, colour) in lines.items():
        axes.plot([*map(float, row)], [*row.values()], "o-", markersize=5, label=name, color=colour, clip_on=False)
    axes.set(title=title, xlabel="depth (0% = start of the context)", ylabel="recalled", xlim=(0, 1), ylim=(0, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    axes.legend(title=legend, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def mean(grid: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over the lengths at each depth."""
    rows: Sequence[Mapping[str, float]] = list(grid.values())
    return {depth: float(np.mean([row[depth] for row in rows])) for depth in rows[0]}
