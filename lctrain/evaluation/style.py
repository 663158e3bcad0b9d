"""The style of all pictures, and the format of token counts."""

from typing import Any

COLOURS = {"before": "#8b7358", "after": "#2563c9"}
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}


def tokens(number: int) -> str:
    """Return a count of tokens as text in units of 1024: 512, 1.5k, 128k, 1M."""
    if number < 1024:
        return str(number)
    return f"{number / 1024:.4g}k" if number < 1024**2 else f"{number / 1024**2:.4g}M"
