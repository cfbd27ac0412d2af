"""The report's curves: what happened to each policy while it trained, as small SVG images that need no network.

Every chart is its own image, sized for one column of text, so that it stays readable on a phone. Raw updates are
points; the line is the mean over three neighbouring updates, the same that the report's verdict reads.
"""

from __future__ import annotations

import base64
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from rrlhf.judging.content import Measured

NEIGHBOURS = 3  # updates that one smoothed value averages


class Point(TypedDict):
    """One PPO update of one arm: means over the responses that were sampled for it."""

    policy: str
    update: int
    kl: float  # nats per response
    proxy: float
    sigma: float
    words: float
    second_opinion: float
    heads: list[float]
    gold: NotRequired[float]
    gold_stderr: NotRequired[float]


class Chosen(TypedDict):
    """What the best of n gives at one n, by the reward of one arm: unbiased estimates, errors over prompts."""

    policy: str
    n: int
    kl: float  # upper bound, nats per response
    reward: Measured  # what decides
    gold: NotRequired[Measured]


Quantity = Literal["gold", "proxy", "sigma", "words", "second_opinion", "kl", "update", "gold_stderr"]


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
AXIS_LABELS: dict[Quantity, str] = {
    "gold": "gold score",
    "proxy": "proxy score",
    "second_opinion": "second opinion",
    "sigma": "σ of the reward",
    "words": "words per response",
    "kl": "√KL from the start (√nats)",
    "update": "PPO update",
}
PANELS: list[tuple[Quantity, Quantity, str, str]] = [
    ("gold", "kl", "Gold by distance", "What the judge says, the further a policy moves away from its start."),
    ("gold", "update", "Gold over training", "The same, over time. A star marks each arm's peak."),
    ("second_opinion", "update", "The second judge", "Of another make than gold: the two should agree."),
    ("proxy", "kl", "Proxy by distance", "What the single reward head says. Rising here while gold falls: hacking."),
    ("proxy", "update", "Proxy over training", "The same, over time."),
    ("sigma", "update", "Uncertainty of the reward", "Growth warns of responses unlike those the reward learned from."),
    ("words", "update", "Length of responses", "A policy that hacks its reward often ends in very short or long text."),
]


def arm_looks(arms: Sequence[str]) -> dict[str, Look]:
    """Give each trained arm its look, in order; an eighth arm starts over."""
    return {name: ARM_LOOKS[i % len(ARM_LOOKS)] for i, name in enumerate(arms)}


def courses(curves: Sequence[Point]) -> dict[str, list[Point]]:
    """Group points by policy, in order of updates."""
    grouped: dict[str, list[Point]] = {}
    for point in sorted(curves, key=lambda point: point["update"]):
        grouped.setdefault(point["policy"], []).append(point)
    return {name: grouped[name] for name in dict.fromkeys(point["policy"] for point in curves)}


def having(points: Sequence[Point], quantity: Quantity) -> list[Point]:
    """Keep the points at which a quantity was measured and is finite."""
    return [point for point in points if quantity in point and math.isfinite(point[quantity])]


def neighbour_means(values: Sequence[float]) -> list[float]:
    """Average every NEIGHBOURS values in a row; fewer values than that give one average of all."""
    return [sum(window) / len(window) for window in _windows(values)]


def neighbour_stderrs(stderrs: Sequence[float]) -> list[float]:
    """Return the standard errors of `neighbour_means`, for independent values: sqrt(sum_i s_i^2) / n."""
    return [math.hypot(*window) / len(window) for window in _windows(stderrs)]


def progress_charts(
    curves: Sequence[Point], looks: Mapping[str, Look], heldout_sigma: float | None = None
) -> list[Chart]:
    """Draw every panel for which some arm has numbers; sigma on held-out pairs is a line of its own."""
    charts = []
    for y, x, title, description in PANELS:
        measured = {name: having(having(points, y), x) for name, points in courses(curves).items()}
        if any(measured.values()):
            level = heldout_sigma if y == "sigma" else None
            said = f"{description} Dashed: on held-out pairs." if level is not None else description
            charts.append(Chart(title, said, _progress_image(measured, looks, y, x, level)))
    return charts


def head_charts(curves: Sequence[Point], looks: Mapping[str, Look]) -> list[Chart]:
    """Draw every head's score over updates, one chart per arm, all on the same scale."""
    arms = {name: [point for point in points if point["heads"]] for name, points in courses(curves).items()}
    scores = [score for points in arms.values() for point in points for score in point["heads"] if math.isfinite(score)]
    if not scores:
        return []
    margin = 0.05 * (max(scores) - min(scores)) + 0.05
    limits = (min(scores) - margin, max(scores) + margin)
    return [
        Chart(name, f"{len(points[0]['heads'])} heads", _heads_image(points, looks[name], limits))
        for name, points in arms.items()
        if points
    ]


def selection_charts(points: Sequence[Chosen], looks: Mapping[str, Look]) -> list[Chart]:
    """Draw gold and the reward that decides against n: over-optimisation without any training."""
    panels: list[tuple[Literal["gold", "reward"], str, str]] = [
        ("gold", "Gold by n", "What the judge says of the response that is chosen. A star marks each arm's peak."),
        ("reward", "Reward by n", "What decides, each arm's own. It can only rise."),
    ]
    charts = []
    for quantity, title, description in panels:
        told = {name: [p for p in points if p["policy"] == name] for name in dict.fromkeys(p["policy"] for p in points)}
        known = {name: [(p["n"], p[quantity]) for p in some if quantity in p] for name, some in told.items()}
        if any(known.values()):
            said = f"{description} Shaded: two standard errors over prompts."
            charts.append(Chart(title, said, _selection_image(known, looks, quantity)))
    return charts


def _selection_image(
    arms: Mapping[str, list[tuple[int, Measured]]], looks: Mapping[str, Look], quantity: Literal["gold", "reward"]
) -> str:
    figure, axes = empty_chart("n (log scale)", "gold score" if quantity == "gold" else "reward")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda n, _: f"{n:g}")
    for name, points in arms.items():
        look, across, up = looks[name], [n for n, _ in points], [found["mean"] for _, found in points]
        wide = [2 * found["stderr"] for _, found in points]
        axes.plot(across, up, color=look.color, linewidth=2)
        axes.plot(across[-1:], up[-1:], look.marker, color=look.color, markersize=6)
        low, high = [u - w for u, w in zip(up, wide, strict=True)], [u + w for u, w in zip(up, wide, strict=True)]
        axes.fill_between(across, low, high, color=look.color, alpha=0.15, linewidth=0)
        if quantity == "gold":
            peak = up.index(max(up))
            axes.plot(across[peak], up[peak], "*", color=look.color, markersize=15, markeredgecolor="white")
    return data_uri(figure)


def _windows(values: Sequence[float]) -> list[Sequence[float]]:
    starts = range(max(len(values) - NEIGHBOURS + 1, min(len(values), 1)))
    return [values[start : start + NEIGHBOURS] for start in starts]


def _progress_image(
    arms: Mapping[str, list[Point]], looks: Mapping[str, Look], y: Quantity, x: Quantity, level: float | None
) -> str:
    figure, axes = empty_chart(AXIS_LABELS[x], AXIS_LABELS[y])
    if level is not None:
        axes.axhline(level, color=REFERENCE_LOOK.color, linewidth=1.4, linestyle=(0, (4, 2.5)))
    for name, points in arms.items():
        look = looks[name]
        across, up = _positions(points, x), [point[y] for point in points]
        smooth_across, smooth_up = neighbour_means(across), neighbour_means(up)
        axes.plot(across, up, look.marker, color=look.color, alpha=0.35, markersize=4, markeredgewidth=0)
        axes.plot(smooth_across, smooth_up, color=look.color, linewidth=2)
        if y == "gold" and x == "update" and points:
            _draw_band(axes, points, smooth_across, smooth_up, look)
            peak = smooth_up.index(max(smooth_up))
            axes.plot(
                smooth_across[peak], smooth_up[peak], "*", color=look.color, markersize=15, markeredgecolor="white"
            )
    return data_uri(figure)


def _draw_band(axes: Any, points: Sequence[Point], across: list[float], up: list[float], look: Look) -> None:
    """Shade two standard errors on either side of smoothed gold."""
    wide = [2 * stderr for stderr in neighbour_stderrs([point.get("gold_stderr", math.nan) for point in points])]
    low, high = [u - w for u, w in zip(up, wide, strict=True)], [u + w for u, w in zip(up, wide, strict=True)]
    axes.fill_between(across, low, high, color=look.color, alpha=0.15, linewidth=0)


def _positions(points: Sequence[Point], x: Quantity) -> list[float]:
    """Return where points stand on the horizontal axis: KL as its root, and noise below zero as zero."""
    return [math.sqrt(max(point["kl"], 0)) if x == "kl" else float(point[x]) for point in points]


def _heads_image(points: Sequence[Point], look: Look, limits: tuple[float, float]) -> str:
    figure, axes = empty_chart("PPO update", "score of each head")
    updates = [point["update"] for point in points]
    for scores in zip(*(point["heads"] for point in points), strict=True):
        axes.plot(updates, scores, color=look.color, alpha=0.6, linewidth=1.2)
    axes.plot(
        updates, [min(point["heads"]) for point in points], color="#222222", linewidth=2.2, linestyle=(0, (4, 1.5))
    )
    axes.set_ylim(*limits)
    return data_uri(figure)


def empty_chart(across: str, up: str, size: tuple[float, float] = (4.8, 3.2)) -> tuple[Any, Any]:
    """Return a figure of `size` inches and its axes, without pyplot: nothing global changes."""
    from matplotlib.figure import Figure  # here, so that the terminal table does not wait for it
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(across, fontsize=11)
    axes.set_ylabel(up, fontsize=11)
    axes.grid(color="#e3e3e3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=across == AXIS_LABELS["update"]))
    axes.ticklabel_format(axis="x", scilimits=(-2, 5))  # a policy that hardly moved: labels would overlap
    return figure, axes


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
