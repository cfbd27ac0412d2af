"""How good reward models are, as tables and pictures: the same in a run's report and in one of a model alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rrlhf.judging.content import Heads, ReliabilityBin, RewardJudgement, Share
from rrlhf.tools.reporting.plots import ARM_LOOKS, Chart, data_uri, dress, empty_chart
from rrlhf.tools.reporting.tables import Table, figures, known

ACCURACY = "How often the better response of a pair gets the higher score, with its 95 % interval; a coin: 0.50."
CALIBRATION = (
    "Of the probability that the better response wins. ECE and MCE: mean and largest gap between stated confidence and "
    "accuracy, 0 is honest. Brier (a coin: 0.250) and likelihood loss (0.693 nats): lower is better. Temperature: what "
    "log-odds should be divided by; above 1 the model is too sure; none where the order is perfect or no better than "
    "chance. It is fitted to these pairs."
)
HEADS = (
    "Coverage: how often the margin that one head gives to a pair lies in the interval that another head states. Much "
    "less than its level: the heads disagree by more than they admit. Spread and σ warn as far as they grow with wrong "
    "orders (rank correlation)."
)
COLOR = ARM_LOOKS[1].color
RELIABILITY = "Accuracy by stated confidence, with 95 % intervals; the number of pairs below. Under the line: too sure."
CORRELATION = "Correlation of the heads' scores. Heads that say the same cannot warn of each other's mistakes."


def tables(models: Sequence[RewardJudgement]) -> Iterator[Table]:
    """Yield how well reward models rank, how honest they are, and what the heads of ensembles say about each other."""
    if not models:
        return
    lines = []
    for model in models:
        for reading, share in model.accuracy.items():
            name = model.name if len(model.accuracy) == 1 else f"{model.name}, {reading}"
            lines.append([name, f"{figures(share)} (n = {share.n})", interval(share)])
    yield Table("Do they rank well?", ["", "accuracy", "95 %"], lines, ACCURACY)
    found = [(model.name, model.calibration) for model in models]
    yield Table(
        "Are they as sure as they should be?",
        ["", "ECE", "MCE", "Brier", "likelihood", "temperature"],
        [
            [name, *(known(value) for value in (c.ece, c.mce, c.brier, c.nll)), known(c.temperature, 2)]
            for name, c in found
        ],
        CALIBRATION,
    )
    for model in models:
        if model.heads:
            title = f"What the heads of {model.name} say about each other"
            yield Table(title, ["", "in numbers"], _heads(model.heads), HEADS)


def charts(models: Sequence[RewardJudgement]) -> list[Chart]:
    """Draw the reliability of every model, and the correlation of the heads of every ensemble."""
    drawn = []
    for model in models:
        figure = reliability_figure(model.calibration.reliability)
        drawn.append(Chart(f"Reliability of {model.name}", RELIABILITY, data_uri(figure)))
    for model in models:
        if model.heads:
            figure = correlation_figure(model.heads.correlation)
            drawn.append(Chart(f"Heads of {model.name}", CORRELATION, data_uri(figure)))
    return drawn


def reliability_figure(bins: Sequence[ReliabilityBin]) -> Any:  # matplotlib.figure.Figure
    """Draw accuracy against confidence with intervals, and below it how many pairs each point stands for."""
    figure, axes = empty_chart("", "accuracy")
    counts = axes.inset_axes([0, -0.34, 1, 0.2], sharex=axes)
    confidence, accuracy = [row.confidence for row in bins], [row.accuracy for row in bins]
    axes.plot([0.5, 1], [0.5, 1], color="#595959", linewidth=1.2, linestyle=(0, (4, 2.5)))
    down, up = [row.accuracy - row.low for row in bins], [row.high - row.accuracy for row in bins]
    axes.errorbar(confidence, accuracy, [down, up], color=COLOR, marker="o", markersize=6, linewidth=1.6, capsize=3)
    axes.set_xlim(0.49, 1.01)
    axes.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    axes.set_ylim(min([0.45, *(row.low - 0.03 for row in bins)]), 1.02)
    axes.tick_params(labelbottom=False)
    counts.bar(confidence, [row.n for row in bins], width=0.03, color=COLOR, alpha=0.6)
    dress(counts, "stated confidence", "pairs")
    return figure


def correlation_figure(correlation: Sequence[Sequence[float | None]]) -> Any:  # matplotlib.figure.Figure
    """Draw a square of heads by heads; cells hold the number while there are few enough to read."""
    figure, axes = empty_chart("head", "head")
    values = [[math.nan if value is None else value for value in row] for row in correlation]
    heads = len(values)
    shown = axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1)
    axes.grid(visible=False)
    axes.set_xticks(range(heads))
    axes.set_yticks(range(heads))
    if heads <= 8:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                ink = "white" if abs(value) > 0.6 else "black"
                axes.text(j, i, "–" if math.isnan(value) else f"{value:.2f}", ha="center", va="center", color=ink)
    figure.colorbar(shown, ax=axes, shrink=0.85)
    return figure


def interval(share: Share) -> str:
    """Write the bounds of a share."""
    return f"{share.low:.2f} to {share.high:.2f}"


def _heads(heads: Heads) -> list[list[str]]:
    return [
        ["spread of the heads", figures(heads.spread)],
        ["stated σ", known(heads.sigma, 2)],
        *([f"coverage of {row.level:.0%}".replace("%", " %"), figures(row.share)] for row in heads.coverage),
        ["spread warns", known(heads.spread_warns, 2)],
        ["σ warns", known(heads.sigma_warns, 2)],
        ["accuracy of each head", ", ".join(known(head.mean, 2) for head in heads.accuracy)],
    ]
