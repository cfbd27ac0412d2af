"""A sweep's tables and pictures."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json

from rrlhf import files
from rrlhf.tools.reporting.comparison import METRICS
from rrlhf.tools.reporting.plots import ACROSS, ARM_LOOKS, Look, draw_line, dress, write_study
from rrlhf.tools.reporting.tables import Table, markdown, plus_minus
from rrlhf.tools.reporting.verdict import columns, smoothed
from rrlhf.tools.sweeps.comparison import Evidence, Found, Row, grouped
from rrlhf.types import Json

OVER = (
    "Rows of several seeds: the interval is over seeds, of which each is one unit. Of one seed: over prompts, and says "
    "nothing of other seeds."
)
FELL = (
    "Gold fell: by more than three standard errors from its peak while the proxy rose, or the finished policy's is "
    "more than two below that of the start."
)
COURSES = ("gold", "second_opinion", "sigma")


@dataclass(frozen=True)
class Sweep:
    """The content of sweep.json."""

    name: str
    grid: Mapping[str, Sequence[Json]]
    overrides: Mapping[str, Json]
    rows: list[Row]
    evidence: Evidence | None = None  # where a policy was named to compare the others with

    def content(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        told: dict[str, Any] = json.loads(to_json(self, inf_nan_mode="null"))
        return told


def as_markdown(sweep: Sweep) -> str:
    """Return the tables as Markdown, with more metrics than a terminal is wide."""
    metrics = [name for name, metric in METRICS.items() if metric.stands != "on the page"]
    return "\n\n".join(map(markdown, tables(sweep, metrics)))


def tables(sweep: Sweep, metrics: Sequence[str]) -> Iterator[Table]:
    """Yield the comparison by these metrics; then a table for each policy that is compared, and one of the alarms."""
    present = [name for name in metrics if any(name in row.metrics for row in sweep.rows)]
    lines = [[label(row), *(_figures(row, name) for name in present)] for row in sweep.rows]
    yield Table("mean ± half of the 95 % interval", ["policy", *present], lines, OVER)
    if sweep.evidence is None:
        return
    known = sweep.evidence
    said = (
        f"Of the win rate it is the share of prompts won against {known.baseline}, and p is of one half. "
        "p is corrected for the number of policies that a quantity compares (Holm)."
    )
    for name in dict.fromkeys(row.name for row in known.paired):
        lines = [
            [
                row.quantity,
                f"{row.difference:+z.2f}",
                "–" if math.isnan(row.low) else f"{row.low:+z.2f} to {row.high:+z.2f}",
                "–" if row.p_holm is None else f"{row.p_holm:.3f}",
                str(row.seeds),
            ]
            for row in known.paired
            if row.name == name
        ]
        header = ["quantity", "difference", "95 % interval", "p", "seeds"]
        yield Table(f"{name} less {known.baseline}, seed by seed", header, lines, said)
    if known.alarms:
        lines = [
            [a.name, str(a.seeds), str(a.fell), str(a.warned), ", ".join(map(str, a.leads)) or "–", str(a.false)]
            for a in known.alarms
        ]
        header = ["policy", "seeds", "gold fell", "warned before", "lead (updates)", "false"]
        yield Table("warnings of reward hacking", header, lines, FELL)


def label(row: Row) -> str:
    """Name a row by its policy and the settings that change it."""
    seeds = f" ({row.seeds} seeds)" if row.seeds > 1 else ""
    return f"{row.name}{seeds}" + (f" ({row.diverged} diverged)" if row.diverged else "")


def _figures(row: Row, metric: str) -> str:
    found = row.metrics.get(metric)
    return plus_minus(found.mean, found.half) if found else "–"


def write(sweep: Sweep, found: Sequence[Found], folder: Path) -> list[Path]:
    """Write sweep.json, sweep.md and a picture of the trainings into a folder."""
    groups = [group for group in grouped(found) if group[0].curve]
    study = write_study(folder, "sweep", sweep, {"courses": courses(groups)} if groups else {})
    written = folder / "sweep.md"
    files.write(written, as_markdown(sweep) + "\n")
    return [*study, written]


def courses(groups: Sequence[Sequence[Found]]) -> Any:
    """Draw what became of each policy while it trained: means over seeds, shaded by their standard error."""
    from matplotlib.figure import Figure

    drawing: Any = Figure(figsize=(9.6, 3.0 * len(COURSES)), layout="constrained")
    axes = drawing.subplots(len(COURSES), 2, sharey="row")
    for quantity, pair in zip(COURSES, axes, strict=True):
        for x, one in zip(("kl", "update"), pair, strict=True):
            for number, group in enumerate(groups):
                _course(one, group, quantity, x, ARM_LOOKS[number % len(ARM_LOOKS)])
            dress(one, ACROSS[x], METRICS[quantity].axis if x == "kl" else "")
    axes[0][0].legend(fontsize=8, frameon=False)
    return drawing


def _course(axes: Any, group: Sequence[Found], quantity: str, x: str, look: Look) -> None:
    """Draw one policy's course, smoothed over neighbouring updates."""
    curves = [columns(map(vars, one.curve), x, quantity) for one in group]
    least = min(up.size for _, up in curves)  # of a seed that ended early
    across, up = np.array([[smoothed(column[:least]) for column in curve] for curve in curves]).swapaxes(0, 1)
    if least:
        at = np.sqrt(across.mean(0).clip(min=0)) if x == "kl" else across.mean(0)
        stderr = up.std(0, ddof=1) / len(curves) ** 0.5 if len(curves) > 1 else None
        draw_line(axes, at, up.mean(0), look, stderr, label=group[0].setting.name)
