"""What a person reads after a run: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING

import yaml

from rrlhf.judging.evaluation import Evaluation
from rrlhf.tools.pages import page
from rrlhf.tools.reporting import plots, rewards
from rrlhf.tools.reporting.comparison import reward_in_words, rows
from rrlhf.tools.reporting.courses import Training
from rrlhf.tools.reporting.tables import Table, figures, known
from rrlhf.tools.reporting.verdict import headline, lead, standings
from rrlhf.types import Json

if TYPE_CHECKING:
    from rrlhf.pipeline.ancestry import Graph, Product

AGREEMENT = (
    "On the responses of the finished policies. Gold is standardised by the start's responses. Coverage: how often it "
    "lies inside the interval that the ensemble calls 90 % sure; much less than 0.90 is overconfidence. Rank "
    "correlations: of the heads' mean with gold, and of the heads' disagreement and stated σ with the size of the "
    "error; above 0 they warn, at 0 they do not. Overrated: how often σ is larger for a response that is rewarded half "
    "a standard deviation above gold than for one that is not; 0.5 is a coin."
)


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
    from rrlhf.tools.lineage.text import branches, details, line

    looks, stand = plots.looks_of(evaluation), standings(evaluation, trained)
    return page(
        "report.html.j2",
        evaluation=evaluation,
        profile=profile,
        rewards={policy.name: reward_in_words(policy) for policy in evaluation.policies},
        standings=stand,
        headline=headline(stand),
        lead=lead(evaluation),
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
        reward_tables=[*rewards.tables(evaluation.reward_models), *_agreement(evaluation)],
        reward_charts=rewards.charts(evaluation.reward_models),
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
