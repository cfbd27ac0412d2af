"""What a person reads after a run: one HTML file that needs no network.

How good its reward models are, `rrlhf evaluate-reward` tells of one alone, too.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import yaml

from rrlhf.judging.content import Heads, RewardJudgement, Share
from rrlhf.judging.evaluation import Evaluation
from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.cards import filled
from rrlhf.tools.lineage.text import branches, details, line
from rrlhf.tools.reporting import plots
from rrlhf.tools.reporting.comparison import reward_in_words, rows
from rrlhf.tools.reporting.plots import ARM_LOOKS, Chart, data_uri, dress, empty_chart
from rrlhf.tools.reporting.tables import Table, figures, known
from rrlhf.tools.reporting.verdict import Training, asked, headline, lead, standings
from rrlhf.types import Json

AGREEMENT = (
    "On the responses of the finished policies. Gold is standardised by the start's responses. Coverage: how often it "
    "lies inside the interval that the ensemble calls 90 % sure; much less than 0.90 is overconfidence. Rank "
    "correlations: of the heads' mean with gold, and of the heads' disagreement and stated σ with the size of the "
    "error; above 0 they warn, at 0 they do not. Overrated: how often σ is larger for a response that is rewarded half "
    "a standard deviation above gold than for one that is not; 0.5 is a coin."
)


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


def render(
    evaluation: Evaluation,
    *,
    profile: str,
    params: Mapping[str, Json],
    lineage: tuple[Graph, Product] | None,
    facts: Mapping[str, str],
    trained: Mapping[str, Training],
) -> str:
    """Return the report as one HTML file; everything in it that others wrote is escaped and made visible.

    lineage: the graph, and the product in it whose ancestry is shown. trained: how each policy's training went, for
    those that were watched.
    """
    looks, stand = plots.looks_of(evaluation), standings(evaluation, trained)
    return filled(
        "report.html.j2",
        evaluation=evaluation,
        profile=profile,
        rewards={policy.name: reward_in_words(policy) for policy in evaluation.policies},
        standings=stand,
        headline=headline(stand, evaluation),
        lead=lead(evaluation),
        asked=asked(evaluation),
        has_gold=bool(evaluation.measured("gold")),
        rows=rows(evaluation),
        looks=looks,
        only_ppo=all(policy.method in {None, "ppo"} for policy in evaluation.policies),
        selection=plots.selection_charts(evaluation, looks),
        progress=plots.course_charts(
            plots.COURSES,
            {name: [*map(vars, points)] for name, points in evaluation.courses.items()},
            looks,
            levels={"sigma": [model.heads.sigma for model in evaluation.reward_models if model.heads]},
        ),
        heads=plots.head_charts(evaluation, looks),
        trained=trained,
        watched=plots.course_charts(
            plots.HEALTH,
            {name: training.rows for name, training in trained.items()},
            looks,
            fired={name: [event.step for event in training.events] for name, training in trained.items()},
        ),
        excerpts={
            name: [list(some) for _, some in groupby(told, key=lambda row: row.row)]
            for name, told in evaluation.excerpts.items()
        },
        reward_tables=[*reward_tables(evaluation.reward_models), *_agreement(evaluation)],
        reward_charts=reward_charts(evaluation.reward_models),
        known=known,
        facts=facts,
        branches=branches(*lineage) if lineage else [],
        line=line,
        details=details,
        params=yaml.safe_dump(dict(params), sort_keys=False, allow_unicode=True),
    )


def _agreement(evaluation: Evaluation) -> list[Table]:
    """Return how the ensemble's beliefs about every policy's responses agree with gold, if there is a judge."""
    lines = []
    for policy in evaluation.gold_agreement:
        warns = (policy.spread_warns, policy.sigma_warns, policy.overrated_auc)
        [coverage] = [figures(row.share) for row in policy.coverage if row.level == 0.9]
        lines.append([policy.name, known(policy.rank_correlation, 2), coverage, *(known(value, 2) for value in warns)])
    header = ["", "rank correlation", "coverage of 90 %", "spread warns", "σ warns", "overrated"]
    return [Table("The ensemble's beliefs against gold", header, lines, AGREEMENT)] if lines else []


def reward_tables(models: Sequence[RewardJudgement]) -> Iterator[Table]:
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


def reward_charts(models: Sequence[RewardJudgement]) -> list[Chart]:
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
