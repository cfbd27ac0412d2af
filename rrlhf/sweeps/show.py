"""A sweep's table and picture."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rrlhf.reporting.markdown import escaped, table
from rrlhf.reporting.plots import ARM_LOOKS, AXIS_LABELS, REFERENCE_LOOK, empty_chart, write_study
from rrlhf.sweeps.comparison import Interval, Row, Sweep, primary
from rrlhf.types import Json

TITLE = "mean ± half of the 95 % interval"
SHOWN = ("gold", "proxy", "kl", "words")


def show(sweep: Sweep) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    header, *rows = cells(sweep["rows"])
    shown = Table(title=TITLE, title_justify="left")
    for name in header:
        shown.add_column(name, justify="left" if name == "policy" else "right", no_wrap=name != "policy")
    for row in rows:
        shown.add_row(*row)
    console = Console(file=sys.stdout)
    console.print(shown)
    console.print(legend(sweep["rows"]), highlight=False, markup=False)


def markdown(sweep: Sweep) -> str:
    """Return the table as Markdown."""
    header, *rows = cells(sweep["rows"])
    return f"{TITLE}\n\n{table(header, rows)}\n\n{escaped(legend(sweep['rows']))}"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table's header and rows."""
    metrics = [name for name in SHOWN if any(name in row["metrics"] for row in rows)]
    figured = [[figures(row["metrics"][name]) if name in row["metrics"] else "–" for name in metrics] for row in rows]
    return [["policy", *metrics], *([label(row), *each] for row, each in zip(rows, figured, strict=True))]


def label(row: Row) -> str:
    """Name a row by its policy and the settings that change it."""
    settings = ", ".join(f"{path.rpartition('.')[2]} {_plain(value)}" for path, value in row["settings"].items())
    seeds = f" ({row['seeds']} seeds)" if row["seeds"] > 1 else ""
    diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
    return f"{row['policy']}{' ' if settings else ''}{settings}{seeds}{diverged}"


def figures(interval: Interval) -> str:
    """Write a mean with half of its interval's width."""
    high = interval["high"]
    return f"{interval['mean']:z.2f}" + (f" ± {high - interval['mean']:.2f}" if high is not None else "")


def legend(rows: Sequence[Row]) -> str:
    """Say what the intervals are over."""
    several = {interval["over"] for row in rows for interval in row["metrics"].values()}
    said = {
        "seeds": "Rows of several seeds: the interval is over seeds, of which each is one unit.",
        "prompts": "Rows of one seed: the interval is over prompts, and says nothing of other seeds.",
    }
    return " ".join(text for over, text in said.items() if over in several)


def write(sweep: Sweep, folder: Path) -> list[Path]:
    """Write sweep.json, sweep.png and sweep.svg into a folder; each appears whole or not at all."""
    return write_study(folder, "sweep", sweep, figure(sweep))


def figure(sweep: Sweep) -> Any:
    """Draw the metric that decides: against a setting of numbers as lines, else one row for each policy."""
    rows = [row for row in sweep["rows"] if primary(sweep["rows"]) in row["metrics"]]
    across = _axis(rows)
    return _lines(rows, across) if across else _dots(rows)


def _axis(rows: Sequence[Row]) -> str | None:
    """Return the first setting with several numbers as values."""
    for path in dict.fromkeys(path for row in rows for path in row["settings"]):
        values = [row["settings"][path] for row in rows if path in row["settings"]]
        if len({json.dumps(value) for value in values}) > 1 and all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in values
        ):
            return path
    return None


def _lines(rows: Sequence[Row], path: str) -> Any:
    metric = primary(rows)
    drawing, axes = empty_chart(path, AXIS_LABELS.get(metric, metric), (7.0, 4.2))  # type: ignore[call-overload]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        others: dict[str, Json] = {name: value for name, value in row["settings"].items() if name != path}
        name = label({**row, "settings": others, "seeds": 1, "diverged": 0})
        groups.setdefault(name, []).append(row)
    for number, (name, some) in enumerate(groups.items()):
        look = REFERENCE_LOOK if name == "sft" else ARM_LOOKS[number % len(ARM_LOOKS)]
        along = sorted((row for row in some if path in row["settings"]), key=lambda row: _number(row, path))
        if along:
            places, found = [_number(row, path) for row in along], [row["metrics"][metric] for row in along]
            axes.errorbar(
                places,
                [each["mean"] for each in found],
                yerr=[_half(each) for each in found],
                color=look.color,
                marker=look.marker,
                capsize=3,
                label=name,
            )
        else:
            level = some[0]["metrics"][metric]  # it does not depend on the setting
            axes.axhline(level["mean"], color=look.color, linewidth=1.4, linestyle=(0, (4, 2.5)), label=name)
            axes.axhspan(level["mean"] - _half(level), level["mean"] + _half(level), color=look.color, alpha=0.1)
    axes.legend(fontsize=9, frameon=False)
    return drawing


def _dots(rows: Sequence[Row]) -> Any:
    metric = primary(rows)
    drawing, axes = empty_chart(metric, "", (7.0, 1.0 + 0.4 * len(rows)))
    for number, row in enumerate(rows):
        interval = row["metrics"][metric]
        look = REFERENCE_LOOK if row["policy"] == "sft" else ARM_LOOKS[0]
        axes.errorbar(interval["mean"], number, xerr=_half(interval), color=look.color, marker=look.marker, capsize=3)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows])
    axes.invert_yaxis()
    return drawing


def _number(row: Row, path: str) -> float:
    value = row["settings"][path]
    return float(value) if isinstance(value, int | float) else math.nan


def _half(interval: Interval) -> float:
    return 0.0 if interval["high"] is None else interval["high"] - interval["mean"]


def _plain(value: Json) -> str:
    return value if isinstance(value, str) else json.dumps(value)
