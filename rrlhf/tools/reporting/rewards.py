"""How good reward models are, as tables and pictures: the same in a run's report and in one of a model alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rrlhf.judging.content import Heads, RewardJudgement, Share
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
CORRELATION = "Heads that say the same cannot warn of each other's mistakes."


def tables(models: Sequence[RewardJudgement]) -> Iterator[Table]:
    """Yield how well reward models rank, how honest they are, and what the heads of ensembles say about each other."""
    if not models:
        return
    lines = [
        [
            model.name if len(model.accuracy) == 1 else f"{model.name}, {reading}",
            f"{figures(share)} (n = {share.n})",
            interval(share),
        ]
        for model in models
        for reading, share in model.accuracy.items()
    ]
    yield Table("Do they rank well?", ["", "accuracy", "95 %"], lines, ACCURACY)
    yield Table(
        "Are they as sure as they should be?",
        ["", "ECE", "MCE", "Brier", "likelihood", "temperature"],
        [
            [model.name, *(known(value) for value in (c.ece, c.mce, c.brier, c.nll)), known(c.temperature, 2)]
            for model in models
            for c in [model.calibration]
        ],
        CALIBRATION,
    )
    for model in models:
        if model.heads:
            title = f"What the heads of {model.name} say about each other"
            yield Table(title, ["", "in numbers"], _heads(model.heads), HEADS)
            numbers = [str(number) for number in range(len(model.heads.correlation))]
            rows = zip(numbers, model.heads.correlation, strict=True)
            lines = [[head, *(known(value, 2) for value in row)] for head, row in rows]
            yield Table(f"Correlation of the heads of {model.name}", ["head", *numbers], lines, CORRELATION)


def charts(models: Sequence[RewardJudgement]) -> list[Chart]:
    """Draw accuracy against confidence of every model, with intervals, and below how many pairs a point stands for."""
    drawn = []
    for model in models:
        bins = model.calibration.reliability
        confidence, accuracy = [row.confidence for row in bins], [row.accuracy for row in bins]
        away = [row.accuracy - row.low for row in bins], [row.high - row.accuracy for row in bins]
        figure, axes = empty_chart("", "accuracy")
        axes.plot([0.5, 1], [0.5, 1], color="#595959", linewidth=1.2, linestyle=(0, (4, 2.5)))
        axes.errorbar(confidence, accuracy, away, color=COLOR, marker="o", capsize=3)
        axes.tick_params(labelbottom=False)
        counts = axes.inset_axes([0, -0.34, 1, 0.2], sharex=axes)
        counts.bar(confidence, [row.n for row in bins], width=0.03, color=COLOR, alpha=0.6)
        dress(counts, "stated confidence", "pairs")
        drawn.append(Chart(f"Reliability of {model.name}", RELIABILITY, data_uri(figure)))
    return drawn


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
