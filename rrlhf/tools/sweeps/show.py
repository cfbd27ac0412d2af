"""A sweep's tables and pictures."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, NotRequired, TypedDict

from rrlhf import files
from rrlhf.tools.reporting.markdown import escaped, table
from rrlhf.tools.reporting.plots import (
    ARM_LOOKS,
    AXIS_LABELS,
    REFERENCE_LOOK,
    Quantity,
    empty_chart,
    neighbour_means,
    write_study,
)
from rrlhf.tools.sweeps.comparison import Found, Group, Interval, Row, grouped, primary
from rrlhf.tools.sweeps.evidence import Alarm, Evidence, Fit, Paired
from rrlhf.types import Json

TITLE = "mean ± half of the 95 % interval"
SHOWN = ("gold", "proxy", "kl", "words")  # as wide as a terminal; the file has more
WRITTEN = ("gold", "second_opinion", "gold_at_length", "proxy", "sigma", "kl", "words", "repetition", "finished")
COURSES: tuple[Quantity, ...] = ("gold", "second_opinion", "sigma")
ACROSS: tuple[Quantity, ...] = ("kl", "update")


class Sweep(TypedDict):
    """The content of sweep.json."""

    name: str
    grid: Mapping[str, Sequence[Json]]
    overrides: Mapping[str, Json]
    rows: list[Row]
    evidence: NotRequired[Evidence]  # where a policy was named to compare the others with


class Titled(NamedTuple):
    """A table as text, the first row its header, with what is said above and below it."""

    title: str
    cells: list[list[str]]
    legend: str


def show(sweep: Sweep) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout)
    for title, (header, *rows), said in tables(sweep, SHOWN):
        shown = Table(title=title, title_justify="left")
        for number, name in enumerate(header):
            shown.add_column(name, justify="right" if number else "left", no_wrap=name != "policy")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
        console.print(said, highlight=False, markup=False)


def markdown(sweep: Sweep) -> str:
    """Return the tables as Markdown."""
    return "\n\n".join(
        f"{title}\n\n{table(header, rows)}\n\n{escaped(said)}"
        for title, (header, *rows), said in tables(sweep, WRITTEN)
    )


def tables(sweep: Sweep, metrics: Sequence[str]) -> list[Titled]:
    """Return the comparison by these metrics, and what there is of evidence."""
    found = [Titled(TITLE, cells(sweep["rows"], metrics), legend(sweep["rows"]))]
    if known := sweep.get("evidence"):
        found += [told for told in (*_paired(known), _fits(known["fits"]), _alarms(known["alarms"])) if told.cells[1:]]
    return found


def _paired(known: Evidence) -> list[Titled]:
    """Return one table for each policy that is compared with the baseline."""
    base, groups = known["baseline"], dict.fromkeys(named(row) for row in known["paired"])
    said = (
        f"Of the win rate it is the share of prompts won against {base}, and p is of one half. "
        "p is corrected for the number of policies that a quantity compares (Holm)."
    )
    return [
        Titled(
            f"{name} less {base}, seed by seed",
            [
                ["quantity", "difference", "95 % interval", "p", "seeds"],
                *(_difference(row) for row in known["paired"] if named(row) == name),
            ],
            said,
        )
        for name in groups
    ]


def _difference(row: Paired) -> list[str]:
    known = row["low"] is not None and row["high"] is not None
    return [
        row["quantity"],
        f"{row['difference']:+z.2f}",
        f"{row['low']:+z.2f} to {row['high']:+z.2f}" if known else "–",
        "–" if row["p_holm"] is None else f"{row['p_holm']:.3f}",
        str(row["seeds"]),
    ]


def _fits(fits: Sequence[Fit]) -> Titled:
    rows = [
        [
            named(fit),
            *(f"{fit[name]:z.2f}" for name in ("start", "alpha", "beta", "r_squared")),
            "–" if fit["peak"] is None else f"{fit['peak'] ** 2:.3g}",
        ]
        for fit in fits
    ]
    return Titled(
        "gold while training = start + d (α - β log d), d = √KL",
        [["policy", "start", "α", "β", "R²", "KL at the peak"], *rows],
        "Gao et al. 2022, for reinforcement learning; the peak may lie beyond what was reached.",
    )


def _alarms(alarms: Sequence[Alarm]) -> Titled:
    rows = [
        [
            named(a),
            str(a["seeds"]),
            str(a["fell"]),
            str(a["warned"]),
            ", ".join(map(str, a["leads"])) or "–",
            str(a["false"]),
        ]
        for a in alarms
    ]
    return Titled(
        "warnings of reward hacking",
        [["policy", "seeds", "gold fell", "warned before", "lead (updates)", "false"], *rows],
        "Gold fell: by more than three standard errors from its peak while the proxy rose, or the finished policy's is "
        "more than two below that of the start.",
    )


def named(row: Paired | Fit | Alarm | Row | Group) -> str:
    """Name a policy by the settings that change it."""
    settings = ", ".join(f"{path.rpartition('.')[2]} {_plain(value)}" for path, value in row["settings"].items())
    return f"{row['policy']}{' ' if settings else ''}{settings}"


def cells(rows: Sequence[Row], metrics: Sequence[str]) -> list[list[str]]:
    """Return the table's header and rows, with those of the metrics that some row has."""
    metrics = [name for name in metrics if any(name in row["metrics"] for row in rows)]
    figured = [[figures(row["metrics"][name]) if name in row["metrics"] else "–" for name in metrics] for row in rows]
    return [["policy", *metrics], *([label(row), *each] for row, each in zip(rows, figured, strict=True))]


def label(row: Row) -> str:
    """Name a row by its policy and the settings that change it."""
    seeds = f" ({row['seeds']} seeds)" if row["seeds"] > 1 else ""
    diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
    return f"{named(row)}{seeds}{diverged}"


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


def write(sweep: Sweep, found: Sequence[Found], folder: Path) -> list[Path]:
    """Write sweep.json, sweep.md and the pictures into a folder; each appears whole or not at all."""
    drawn = {"sweep": figure(sweep)}
    if groups := [group for group in grouped(found) if group["found"][0].curve]:
        drawn["courses"] = courses(groups)
    study = write_study(folder, "sweep", sweep, drawn)
    written = folder / "sweep.md"
    files.write(written, markdown(sweep) + "\n")
    return [*study, written]


def courses(groups: Sequence[Group]) -> Any:
    """Draw what became of each policy while it trained: means over seeds, shaded by their standard error."""
    from matplotlib.figure import Figure

    drawing: Any = Figure(figsize=(9.6, 3.0 * len(COURSES)), layout="constrained")
    axes = drawing.subplots(len(COURSES), 2, sharey="row")
    for quantity, pair in zip(COURSES, axes, strict=True):
        for across, one in zip(ACROSS, pair, strict=True):
            for number, group in enumerate(groups):
                _course(one, group, quantity, across, ARM_LOOKS[number % len(ARM_LOOKS)].color)
            one.set_xlabel(AXIS_LABELS[across])
            one.grid(color="#e3e3e3", linewidth=0.8)
            one.spines[["top", "right"]].set_visible(False)
        pair[0].set_ylabel(AXIS_LABELS[quantity])
    axes[0][0].legend(fontsize=8, frameon=False)
    return drawing


def _course(axes: Any, group: Group, quantity: Quantity, across: Quantity, color: str) -> None:
    """Draw one policy's course, smoothed over neighbouring updates."""
    curves = [[point for point in one.curve if quantity in point] for one in group["found"]]
    least = min(map(len, curves))  # of a seed that ended early
    if not least:
        return
    values = [[point[quantity] for point in curve[:least]] for curve in curves]
    places = [[point[across] for point in curve[:least]] for curve in curves]
    mean, place = (neighbour_means([fmean(column) for column in zip(*rows, strict=True)]) for rows in (values, places))
    at = [math.sqrt(max(x, 0.0)) for x in place] if across == "kl" else place
    axes.plot(at, mean, color=color, linewidth=1.8, label=named(group))
    if len(curves) > 1:
        smoothed = [neighbour_means(row) for row in values]
        error = [stdev(column) / math.sqrt(len(column)) for column in zip(*smoothed, strict=True)]
        low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)


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
