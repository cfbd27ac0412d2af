"""Pictures of how honest a reward model is: reliability, and how alike its heads are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rrlhf.judging.content import ReliabilityBin, RewardJudgement
from rrlhf.tools.reporting.plots import ARM_LOOKS, Chart, data_uri, empty_chart

COLOR = ARM_LOOKS[1].color


def charts(models: Sequence[RewardJudgement]) -> list[Chart]:
    """Draw the reliability of every model, and the correlation of the heads of every ensemble."""
    drawn = []
    for model in models:
        said = (
            "Accuracy by stated confidence, with 95 % intervals; the number of pairs below. Under the line: too sure."
        )
        figure = reliability_figure(model["calibration"]["reliability"])
        drawn.append(Chart(f"Reliability of {model['name']}", said, data_uri(figure)))
    for model in models:
        if "heads" in model:
            said = "Correlation of the heads' scores. Heads that say the same cannot warn of each other's mistakes."
            figure = correlation_figure(model["heads"]["correlation"])
            drawn.append(Chart(f"Heads of {model['name']}", said, data_uri(figure)))
    return drawn


def reliability_figure(bins: Sequence[ReliabilityBin]) -> Any:  # matplotlib.figure.Figure
    """Draw accuracy against confidence with intervals, and below it how many pairs each point stands for."""
    figure, axes = empty_chart("", "accuracy")
    counts = axes.inset_axes([0, -0.34, 1, 0.2], sharex=axes)
    confidence, accuracy = [row["confidence"] for row in bins], [row["accuracy"] for row in bins]
    axes.plot([0.5, 1], [0.5, 1], color="#595959", linewidth=1.2, linestyle=(0, (4, 2.5)))
    down, up = [row["accuracy"] - row["low"] for row in bins], [row["high"] - row["accuracy"] for row in bins]
    axes.errorbar(confidence, accuracy, [down, up], color=COLOR, marker="o", markersize=6, linewidth=1.6, capsize=3)
    axes.set_xlim(0.49, 1.01)
    axes.set_xticks([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    axes.set_ylim(min([0.45, *(row["low"] - 0.03 for row in bins)]), 1.02)
    axes.tick_params(labelbottom=False)
    counts.bar(confidence, [row["n"] for row in bins], width=0.03, color=COLOR, alpha=0.6)
    counts.set_ylabel("pairs", fontsize=11)
    counts.set_xlabel("stated confidence", fontsize=11)
    counts.spines[["top", "right"]].set_visible(False)
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
