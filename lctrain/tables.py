"""Print tables that can be read in a narrow terminal and in a log file."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from textwrap import wrap

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

WIDTH = 80  # columns where output is no terminal, unless the environment variable COLUMNS is set
SHORT = 16  # cells up to this width stay on one line
MAX_LINES = 5  # per row, on average; taller rows are easier to read as a list
NUMBER = re.compile(r"[-+]?[\d,.]+(e[-+]?\d+)?[%×*]?|-")


def show(table: Table, console: Console | None = None) -> None:
    """Print a table whose cells are plain text, and break no word and no number over lines.

    A table that is too wide is changed in this order until it fits: headings are wrapped; as few columns as possible
    that are the same in every row move above the table, the left ones first; cells are wrapped between words; each row
    becomes a list of its cells.
    """
    console = console or Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH)
    columns = [_Column(column, [str(cell) for cell in column.cells]) for column in table.columns]
    same = sorted((column for column in columns if column.is_constant), key=lambda column: column.cells[0] != "")
    same = same if len(same) < len(columns) else []
    _print(console, table.title, style="bold")
    for moved, wrapped in [(same[:number], False) for number in range(len(same) + 1)] + [(same, True)]:
        kept = [column for column in columns if column not in moved]
        if widths := _widths(kept, console.width, wrapped):
            _print_side_by_side(console, [column.tell(0) for column in moved])
            console.print(_drawn(table, kept, widths))
            break
    else:
        _print_side_by_side(console, [column.tell(0) for column in same])
        for row in range(table.row_count):
            for column in columns:
                _print(console, "" if column in same else column.tell(row), indent="  ")
            console.print()
    _print(console, table.caption)


@dataclass(frozen=True, eq=False)
class _Column:
    source: Column
    cells: Sequence[str]

    @property
    def heading(self) -> str:
        return str(self.source.header)

    @property
    def is_constant(self) -> bool:
        return len(self.cells) > 1 and len(set(self.cells)) == 1

    @property
    def is_numeric(self) -> bool:
        return any(self.cells) and all(NUMBER.fullmatch(cell) for cell in self.cells if cell)

    def tell(self, row: int) -> str:
        """Return one cell after its heading, "" where the cell is empty."""
        name = " ".join(self.heading.split())
        return f"{name}: {self.cells[row]}" if name and self.cells[row] else self.cells[row]

    def most(self) -> int:
        """Return the width at which nothing is wrapped."""
        return _longest([self.heading, *self.cells], str.splitlines)

    def least(self, wrapped: bool) -> int:
        """Return the width at which no word of the heading and no cell is broken.

        With `wrapped`, cells wider than SHORT may be broken between words.
        """
        whole = [cell for cell in self.cells if cell_len(cell) <= SHORT or not wrapped]
        words = _longest([self.heading, *self.cells], str.split)
        return max(words, _longest(whole, str.splitlines))

    def drawn(self, width: int) -> Column:
        """Return the column without its cells, at a fixed width."""
        column = self.source.copy()
        column.header, column.width = Text(self.heading), width
        column.justify = "right" if self.is_numeric else column.justify
        return column


def _longest(texts: Iterable[str], parts: Callable[[str], list[str]]) -> int:
    return max((cell_len(part) for text in texts for part in parts(text)), default=0)


def _widths(columns: Sequence[_Column], available: int, wrapped: bool) -> list[int] | None:
    """Return the columns' widths, with the widest narrowed first; None where no widths make a readable table."""
    available -= 3 * len(columns) + 1  # lines and spaces between them
    bounds = [(column.least(wrapped), column.most()) for column in columns]
    if sum(least for least, _ in bounds) > available:
        return None
    widths: list[int] = []
    for level in range(max((most for _, most in bounds), default=0), -1, -1):
        widths = [min(most, max(least, level)) for least, most in bounds]
        if sum(widths) <= available:
            break
    rows = zip(*(column.cells for column in columns), strict=True)
    heights = [max(len(_lines(cell, width)) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return widths if sum(heights) <= MAX_LINES * len(heights) else None


def _drawn(table: Table, columns: Sequence[_Column], widths: Sequence[int]) -> Table:
    drawn = Table(*(column.drawn(width) for column, width in zip(columns, widths, strict=True)), box=table.box)
    rows = zip(*(column.cells for column in columns), strict=True)
    for source, cells in zip(table.rows, rows, strict=True):
        drawn.add_row(*map(Text, cells), end_section=source.end_section)
    return drawn


def _print_side_by_side(console: Console, texts: Iterable[str]) -> None:
    """Print short texts, as many on a line as fit."""
    line = ""
    for text in filter(None, texts):
        longer = f"{line} · {text}" if line else text
        if line and cell_len(longer) > console.width:
            _print(console, line)
            longer = text
        line = longer
    _print(console, line)


def _print(console: Console, text: object, *, style: str = "", indent: str = "") -> None:
    """Print a paragraph, or nothing where there is no text; `indent` precedes all lines but the first."""
    for line in _lines(str(text or ""), console.width, indent):
        console.print(Text(line, style=style), soft_wrap=True)


def _lines(text: str, width: int, indent: str = "") -> list[str]:
    return wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
