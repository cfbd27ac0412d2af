"""Every picture: a course as a line, an interval as a dot on a bar; no network, and nothing of pyplot's global state.

A chart of a page is its own SVG, sized for one column of text, so that it stays readable on a phone.
"""

from __future__ import annotations

import base64
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rrlhf.judging.content import Measured
from rrlhf.judging.evaluation import Evaluation, Point
from rrlhf.tools.reporting.comparison import FIRST, METRICS
from rrlhf.tools.reporting.differences import Quantity, gold_stderrs, having, neighbour_means, smoothed, values


class Look(NamedTuple):
    """How a policy is drawn everywhere: a colour (Okabe and Ito 2008, colour-blind safe) and a shape."""

    color: str
    marker: str  # matplotlib's name of the shape
    glyph: str  # the same shape as text


class Chart(NamedTuple):
    """One image with the words around it."""

    title: str
    description: str
    image: str  # data URI


class Bar(NamedTuple):
    """One interval and how it is drawn; without one, `half` is NaN."""

    name: str
    middle: float
    half: float
    look: Look


REFERENCE_LOOK = Look("#595959", "o", "●")
ARM_LOOKS = [
    Look("#D55E00", "o", "●"),
    Look("#0072B2", "s", "■"),
    Look("#009E73", "^", "▲"),
    Look("#CC79A7", "D", "◆"),
    Look("#B8860B", "v", "▼"),
    Look("#56B4E9", "P", "✚"),
    Look("#000000", "X", "✖"),
]
ACROSS: dict[Quantity, str] = {"kl": "√KL from the start (√nats)", "update": "PPO update"}
PANELS: list[tuple[Quantity, Quantity, str, str]] = [
    ("gold", "kl", "Gold by distance", "What the judge says, the further a policy moves away from its start."),
    ("gold", "update", "Gold over training", "The same, over time. A star marks each arm's peak."),
    ("second_opinion", "update", "The second judge", "Of another make than gold: the two should agree."),
    ("proxy", "kl", "Proxy by distance", "What the single reward head says. Rising here while gold falls: hacking."),
    ("proxy", "update", "Proxy over training", "The same, over time."),
    ("sigma", "update", "Uncertainty of the reward", "Growth warns of responses unlike those the reward learned from."),
    ("words", "update", "Length of responses", "A policy that hacks its reward often ends in very short or long text."),
]
BY_N: list[tuple[Literal["gold", "reward"], str, str]] = [
    ("gold", "Gold by n", "What the judge says of the response that is chosen. A star marks each arm's peak."),
    ("reward", "Reward by n", "What decides, each arm's own. It can only rise."),
]


def looks_of(evaluation: Evaluation) -> dict[str, Look]:
    """Give every policy its look: the start is grey, an eighth arm starts over."""
    looks = {name: ARM_LOOKS[i % len(ARM_LOOKS)] for i, name in enumerate(evaluation.arms)}
    return looks if evaluation.start is None else {evaluation.start: REFERENCE_LOOK, **looks}


def progress_charts(evaluation: Evaluation, looks: Mapping[str, Look]) -> list[Chart]:
    """Draw every panel for which some arm has numbers; sigma on held-out pairs is a line of its own."""
    heldout = next((model.heads.sigma for model in evaluation.reward_models if model.heads), None)
    charts = []
    for y, x, title, said in PANELS:
        arms = {name: having(points, y, x) for name, points in evaluation.courses.items()}
        if not any(arms.values()):
            continue
        figure, axes = empty_chart(ACROSS[x], METRICS[y].axis)
        if y == "sigma" and heldout is not None:
            axes.axhline(heldout, color=REFERENCE_LOOK.color, linewidth=1.4, linestyle=(0, (4, 2.5)))
            said = f"{said} Dashed: on held-out pairs."
        for name, points in arms.items():
            across = positions(points, x)
            draw_points(axes, across, values(points, y), looks[name])
            judged = y == "gold" and x == "update"
            halves = [2 * stderr for stderr in gold_stderrs(points)] if judged else None
            draw_line(axes, neighbour_means(across), smoothed(points, y), looks[name], halves, star=judged)
        charts.append(Chart(title, said, data_uri(figure)))
    return charts


def head_charts(evaluation: Evaluation, looks: Mapping[str, Look]) -> list[Chart]:
    """Draw every head's score over updates, one chart per arm, all on the same scale."""
    arms = {name: [point for point in points if point.heads] for name, points in evaluation.courses.items()}
    scores = [score for points in arms.values() for point in points for score in point.heads if math.isfinite(score)]
    charts = []
    for name, points in arms.items():
        if points and scores:
            figure, axes = empty_chart(ACROSS["update"], "score of each head")
            updates = [point.update for point in points]
            for head in zip(*(point.heads for point in points), strict=True):
                axes.plot(updates, head, color=looks[name].color, alpha=0.6, linewidth=1.2)
            lowest = [min(point.heads) for point in points]
            axes.plot(updates, lowest, color="#222222", linewidth=2.2, linestyle=(0, (4, 1.5)))
            margin = 0.05 * (max(scores) - min(scores)) + 0.05
            axes.set_ylim(min(scores) - margin, max(scores) + margin)
            charts.append(Chart(name, f"{len(points[0].heads)} heads", data_uri(figure)))
    return charts


def selection_charts(evaluation: Evaluation, looks: Mapping[str, Look]) -> list[Chart]:
    """Draw gold and the reward that decides against n: over-optimisation without any training."""
    charts = []
    for quantity, title, said in BY_N:
        arms: dict[str, dict[int, Measured]] = {
            name: {point.n: found for point in points if (found := getattr(point, quantity))}
            for name, points in evaluation.selections.items()
        }
        if any(arms.values()):
            figure, axes = empty_chart("n (log scale)", METRICS[quantity].axis)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda n, _: f"{n:g}")
            for name, found in arms.items():
                means, halves = [one.mean for one in found.values()], [2 * one.stderr for one in found.values()]
                draw_line(axes, [*found], means, looks[name], halves, star=quantity == "gold")
                axes.plot([*found][-1:], means[-1:], looks[name].marker, color=looks[name].color, markersize=6)
            charts.append(Chart(title, f"{said} Shaded: two standard errors over prompts.", data_uri(figure)))
    return charts


def interval_charts(evaluation: Evaluation, looks: Mapping[str, Look]) -> list[Chart]:
    """Draw every policy's mean with two standard errors on either side, for the metrics that tell most."""
    charts = []
    for metric in FIRST:
        known = evaluation.measured(metric)
        if len(known) > 1:
            bars = [Bar(name, value.mean, 2 * value.stderr, looks[name]) for name, value in known.items()]
            figure, axes = empty_chart("", "", (4.8, 0.7 + 0.35 * len(bars)))
            draw_bars(axes, bars)
            if evaluation.start in known:
                axes.axvline(known[evaluation.start].mean, color=REFERENCE_LOOK.color, linewidth=1, linestyle=":")
            charts.append(Chart(metric, METRICS[metric].meaning, data_uri(figure)))
    return charts


def positions(points: Sequence[Point], x: Quantity) -> list[float]:
    """Return where points stand on the horizontal axis: KL as its root, and noise below zero as zero."""
    return [math.sqrt(max(value, 0)) if x == "kl" else value for value in values(points, x)]


def draw_points(axes: Any, across: Sequence[float], up: Sequence[float], look: Look, size: float = 4) -> None:
    """Draw what was measured, lightly."""
    axes.plot(across, up, look.marker, color=look.color, alpha=0.35, markersize=size, markeredgewidth=0)


def draw_line(
    axes: Any,
    across: Sequence[float],
    up: Sequence[float],
    look: Look,
    halves: Sequence[float] | None = None,
    *,
    star: bool = False,
    label: str | None = None,
) -> None:
    """Draw a line, shaded by so much on either side; with a star at its peak if asked."""
    axes.plot(across, up, color=look.color, linewidth=2, label=label)
    if halves is not None:
        low, high = ([u + sign * half for u, half in zip(up, halves, strict=True)] for sign in (-1, 1))
        axes.fill_between(across, low, high, color=look.color, alpha=0.15, linewidth=0)
    if star and up:
        peak = up.index(max(up))
        axes.plot(across[peak], up[peak], "*", color=look.color, markersize=15, markeredgecolor="white")


def draw_bars(axes: Any, bars: Sequence[Bar], *, names: bool = True) -> None:
    """Draw one interval a row, the first at the top."""
    for row, bar in enumerate(bars):
        half = 0.0 if math.isnan(bar.half) else bar.half
        axes.errorbar(bar.middle, row, xerr=half, color=bar.look.color, marker=bar.look.marker, capsize=3)
    axes.set_yticks(range(len(bars)) if names else [], [bar.name for bar in bars] if names else [])
    axes.set_ylim(len(bars) - 0.5, -0.5)


def empty_chart(across: str, up: str, size: tuple[float, float] = (4.8, 3.2)) -> tuple[Any, Any]:
    """Return a figure of `size` inches and its axes."""
    from matplotlib.figure import Figure  # here, so that the terminal table does not wait for it

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    dress(axes, across, up)
    return figure, axes


def dress(axes: Any, across: str, up: str) -> None:
    """Name the axes, and draw a grid and no frame."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(across, fontsize=11)
    axes.set_ylabel(up, fontsize=11)
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=across in {ACROSS["update"], "rollout"}))
    axes.ticklabel_format(axis="x", scilimits=(-2, 5))  # a policy that hardly moved: labels would overlap


def write_study(folder: Path, name: str, study: Mapping[str, Any], figures: Mapping[str, Any]) -> list[Path]:
    """Write a study's numbers as NAME.json and each figure as .png and .svg; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        staged = Path(beside, name)
        staged.with_suffix(".json").write_text(json.dumps(study, indent=1), encoding="utf-8")
        for drawn, figure in figures.items():
            figure.savefig(Path(beside, f"{drawn}.png"), dpi=110)
            figure.savefig(Path(beside, f"{drawn}.svg"), metadata={"Date": None})
        return [path.replace(folder / path.name) for path in sorted(staged.parent.iterdir())]


def data_uri(figure: Any) -> str:
    """Return the figure as an SVG image inside a URI; same numbers, same bytes."""
    import matplotlib as mpl

    svg = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "rrlhf", "svg.fonttype": "path"}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
