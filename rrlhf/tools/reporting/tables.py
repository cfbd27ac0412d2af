"""Tables of figures as text, for a terminal and for Markdown, in which what others wrote is made visible."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rrlhf.judging.content import Measured
from rrlhf.redact import visible

if TYPE_CHECKING:
    from rich.table import Table as Drawn

SPECIAL = re.compile(r"([\\`*_\[\]<>|~&])")


class Table(NamedTuple):
    """One table; the first column says what a row is about, the others hold figures. ★ before a figure: the best."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    said: str = ""  # below it


def plus_minus(value: float, half: float, sign: str = "") -> str:
    """Write a number with what it may be off by, "1.05 ± 0.12"; sign "+": also of a positive number."""
    return f"{value:{sign}z.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")


def figures(value: Measured) -> str:
    """Write a mean with its standard error."""
    return plus_minus(value.mean, value.stderr)


def known(value: float | None, decimals: int = 3) -> str:
    """Write a number; an undetermined one is a dash."""
    return "–" if value is None else f"{value:z.{decimals}f}"


def show(*parts: Table | Drawn | str) -> None:
    """Print tables, with what is said below each, and sentences."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, markup=False)
    for part in parts:
        if isinstance(part, Table):
            console.print(_drawn(part))
            part = part.said
        if part:
            console.print(part)


def _drawn(table: Table) -> Drawn:
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(title=Text(visible(table.title)), title_justify="left")
    for number, name in enumerate(table.header):
        no_wrap = not name or (number > 0 and len(name.split()) == 1)
        drawn.add_column(Text(visible(name)), justify="right" if number else "left", no_wrap=no_wrap)
    for row in table.rows:
        drawn.add_row(*(Text(visible(cell), style="bold" if cell.startswith("★") else "") for cell in row))
    return drawn


def markdown(table: Table) -> str:
    """Return a table as Markdown, with its title and what is said below it."""
    header, *rows = ([escaped(cell) for cell in row] for row in [table.header, *table.rows])
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join(filter(None, [escaped(table.title), drawn, escaped(table.said)]))


def escaped(text: str) -> str:
    """Return a text of one line that Markdown shows as it is."""
    return SPECIAL.sub(r"\\\1", visible(" ".join(text.split())))
