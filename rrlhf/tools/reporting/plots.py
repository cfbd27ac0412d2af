"""Every picture: a course as a line, an interval as a dot on a bar; no network, and nothing of pyplot's global state.

A chart of a page is its own SVG, sized for one column of text, so that it stays readable on a phone.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from pydantic_core import to_json

from rrlhf.files import write
from rrlhf.judging.evaluation import Evaluation
from rrlhf.tools.reporting.comparison import METRICS
from rrlhf.tools.reporting.verdict import columns, smoothed, smoothed_stderr


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


Panel = tuple[str, str, str, str]  # a quantity, what it is drawn against, title, words


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
ACROSS = {"kl": "√KL from the start (√nats)", "update": "PPO update", "step": "rollout", "n": "n (log scale)"}
COURSES: list[Panel] = [
    ("gold", "kl", "Gold by distance", "What the judge says, the further a policy moves away from its start."),
    ("gold", "update", "Gold over training", "The same, over time. A star marks each arm's peak."),
    ("second_opinion", "update", "The second judge", "Of another make than gold: the two should agree."),
    ("judge_score", "update", "The judge that you brought", "Its score. Falling while the proxy rises: hacking."),
    ("proxy", "kl", "Proxy by distance", "What the single head says. Rising here while gold falls: hacking."),
    ("proxy", "update", "Proxy over training", "The same, over time."),
    (
        "sigma",
        "update",
        "Uncertainty of the reward",
        "Growth warns of responses unlike those it learned from; dashed: held-out pairs.",
    ),
    ("words", "update", "Length of responses", "A hacked reward often ends in very short or long text."),
]
HEALTH: list[Panel] = [
    ("score", "step", "Score", "what the arm is paid, before KL"),
    ("score_std", "step", "Spread of the score", "over the responses of a rollout"),
    ("kl", "step", "KL", "nats per response to the start"),
    ("entropy", "step", "Entropy", "nats per token"),
    ("response_tokens", "step", "Length", "tokens per response"),
    ("finished", "step", "Finished", "share of responses with an end"),
    ("repetition", "step", "Repetition", "share of token pairs said before"),
    ("sigma", "step", "Uncertainty", "standard deviation of the reward"),
    ("spread", "step", "Spread of the heads", "how much they disagree"),
    ("explained_variance", "step", "Explained variance", "of returns, by the value function"),
    ("clip_fraction", "step", "Clip fraction", "share of tokens clipped"),
    ("step_kl", "step", "KL of an update", "nats per token"),
    ("gradient_norm", "step", "Gradient norm", "before clipping"),
]
BY_N: list[Panel] = [
    ("gold", "n", "Gold by n", "What the judge says of the response that is chosen. A star marks each arm's peak."),
    ("reward", "n", "Reward by n", "What decides, each arm's own. It can only rise."),
]


def looks_of(evaluation: Evaluation) -> dict[str, Look]:
    """Give every policy its look: the start is grey, an eighth arm starts over."""
    looks = {name: ARM_LOOKS[i % len(ARM_LOOKS)] for i, name in enumerate(evaluation.arms)}
    return looks if evaluation.start is None else {evaluation.start: REFERENCE_LOOK, **looks}


def course_charts(
    panels: Sequence[Panel],
    arms: Mapping[str, Sequence[Mapping[str, Any]]],
    looks: Mapping[str, Look],
    *,
    levels: Mapping[str, Sequence[float]] | None = None,
    fired: Mapping[str, Sequence[int]] | None = None,
) -> list[Chart]:
    """Draw each panel for which some arm has numbers: its rows lightly, and a line of means over neighbouring ones.

    levels: by quantity, where dashed lines lie. fired: by arm, at which steps dotted lines stand.
    """
    charts = []
    for y, x, title, said in panels:
        small, judged = x == "step", (y, x) == ("gold", "update")
        names = [x, y, "gold_stderr"] if judged else [x, y]
        known = {name: found for name, rows in arms.items() if (found := columns(rows, *names))[0].size}
        figure, axes = empty_chart(ACROSS[x], *(("", (2.9, 2.0)) if small else (METRICS[y].axis,)))
        axes.ticklabel_format(useOffset=False)
        for name, (across, up, *stderr) in known.items():
            across = np.sqrt(across.clip(min=0)) if x == "kl" else across
            axes.plot(across, up, looks[name].marker, color=looks[name].color, alpha=0.35, markersize=4, mew=0)
            halves = 2 * smoothed_stderr(stderr[0]) if judged else None
            draw_line(axes, smoothed(across), smoothed(up), looks[name], halves, star=judged)
        for name, steps in (fired or {}).items():
            for step in steps:
                axes.axvline(step, color=looks[name].color, linewidth=1.4, linestyle=":")
        for level in (levels or {}).get(y, ()):
            axes.axhline(level, color=REFERENCE_LOOK.color, linewidth=1.4, linestyle=(0, (4, 2.5)))
        if known:
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
            updates, heads = [point.update for point in points], np.array([point.heads for point in points])
            axes.plot(updates, heads, color=looks[name].color, alpha=0.6, linewidth=1.2)
            axes.plot(updates, heads.min(1), color="#222222", linewidth=2.2, linestyle=(0, (4, 1.5)))
            margin = 0.05 * (max(scores) - min(scores)) + 0.05
            axes.set_ylim(min(scores) - margin, max(scores) + margin)
            charts.append(Chart(name, f"{heads.shape[1]} heads", data_uri(figure)))
    return charts


def selection_charts(evaluation: Evaluation, looks: Mapping[str, Look]) -> list[Chart]:
    """Draw gold and the reward that decides against n: over-optimisation without any training."""
    charts = []
    for y, x, title, said in BY_N:
        figure, axes = empty_chart(ACROSS[x], METRICS[y].axis)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda n, _: f"{n:g}")
        for name, points in evaluation.selections.items():
            found = {point.n: value for point in points if (value := getattr(point, y))}
            means, halves = [one.mean for one in found.values()], [2 * one.stderr for one in found.values()]
            draw_line(axes, [*found], means, looks[name], halves, star=y == "gold")
            axes.plot([*found][-1:], means[-1:], looks[name].marker, color=looks[name].color, markersize=6)
        if any(getattr(point, y) for point in evaluation.selection):
            charts.append(Chart(title, f"{said} Shaded: two standard errors over prompts.", data_uri(figure)))
    return charts


def draw_line(
    axes: Any,
    across: ArrayLike,
    up: ArrayLike,
    look: Look,
    halves: ArrayLike | None = None,
    *,
    star: bool = False,
    label: str | None = None,
) -> None:
    """Draw a line, shaded by so much on either side; with a star at its peak if asked."""
    x, y = np.asarray(across), np.asarray(up)
    axes.plot(x, y, color=look.color, linewidth=2, label=label)
    if halves is not None:
        axes.fill_between(x, y - halves, y + halves, color=look.color, alpha=0.15, linewidth=0)
    if star and y.size:
        axes.plot(x[y.argmax()], y.max(), "*", color=look.color, markersize=15, markeredgecolor="white")


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
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=across in {ACROSS["update"], ACROSS["step"]}))
    axes.ticklabel_format(axis="x", scilimits=(-2, 5))  # a policy that hardly moved: labels would overlap


def write_study(folder: Path, name: str, study: object, figures: Mapping[str, Any]) -> list[Path]:
    """Write a study's numbers as NAME.json, what is not finite as null, and each figure as .png and .svg."""
    written = [folder / f"{name}.json", *(folder / f"{drawn}{end}" for drawn in figures for end in (".png", ".svg"))]
    write(written[0], to_json(study, indent=1, inf_nan_mode="null").decode())
    for path in written[1:]:
        figures[path.stem].savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    return written


def data_uri(figure: Any) -> str:
    """Return the figure as an SVG image inside a URI; same numbers, same bytes."""
    import matplotlib as mpl

    svg = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "rrlhf", "svg.fonttype": "path"}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()
