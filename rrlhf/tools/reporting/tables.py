"""Tables of figures as text, for a terminal, for Markdown and (templates/table.html.j2) for HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from rrlhf.judging.content import Measured
from rrlhf.tools.pages import visible

if TYPE_CHECKING:
    from rich.console import Console

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


def show(table: Table, console: Console) -> None:
    """Print a table, and what is said below it."""
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(title=Text(visible(table.title)), title_justify="left")
    for number, name in enumerate(table.header):
        no_wrap = not name or (number > 0 and len(name.split()) == 1)
        drawn.add_column(Text(visible(name)), justify="right" if number else "left", no_wrap=no_wrap)
    for row in table.rows:
        drawn.add_row(*(Text(visible(cell), style="bold" if cell.startswith("★") else "") for cell in row))
    console.print(drawn)
    if table.said:
        console.print(table.said, highlight=False, markup=False)


def markdown(table: Table) -> str:
    """Return a table as Markdown, with its title and what is said below it."""
    header, *rows = ([escaped(cell) for cell in row] for row in [table.header, *table.rows])
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join(filter(None, [escaped(table.title), drawn, escaped(table.said)]))


def escaped(text: str) -> str:
    """Return a text of one line that Markdown shows as it is."""
    return SPECIAL.sub(r"\\\1", visible(" ".join(text.split())))
