"""What a person reads after a run: a verdict in sentences, a table, and one HTML file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import yaml
from rich.table import Table
from rich.text import Text

from rrlhf.policy.excerpts import Excerpt
from rrlhf.tools.judging import plots as reward_plots
from rrlhf.tools.pages import page, visible
from rrlhf.tools.reporting import plots, trainings
from rrlhf.tools.reporting.evaluation import Evaluation, Policy, highest, in_figures, measured
from rrlhf.tools.reporting.plots import Look
from rrlhf.tools.reporting.standing import headline, scales, standings
from rrlhf.tools.reporting.trainings import Training
from rrlhf.tools.reporting.verdict import verdict
from rrlhf.types import Json

if TYPE_CHECKING:
    from rrlhf.pipeline.ancestry import Graph, Product

METRICS = {
    "gold": "Score by an independent judge that no policy is trained against: the nearest thing here to real quality.",
    "second_opinion": "Score by a second judge, of another make, that no policy is trained against either.",
    "gold_at_length": "Gold at the start's length: what mere length gains or loses is taken off.",
    "proxy": "Score by the single reward head, which plain PPO is trained to please. High with low gold: hacking.",
    "reward": "The reward that this arm was trained on or chooses by.",
    "nominal": "Score by the most confident head of the ensemble.",
    "worst": "Score by whichever head likes the response least.",
    "mean": "Average score over the heads of the ensemble.",
    "spread": "How much the heads disagree about a response (standard deviation). High: they are guessing.",
    "sigma": "How unsure the ensemble is of a score: its standard deviation. High: far from what it learned from.",
    "kl": "How far the policy moved from its start, in nats per response. 0: not at all. Best of n: at most.",
    "words": "Words per response.",
    "repetition": "Share of words that occurred before in the same response, 0 to 1.",
    "finished": "Share of responses that came to an end instead of being cut off, 0 to 1.",
    "relevance": "A part of gold: how near a response is to its topic, 0 to 1.",
    "tone": "A part of gold: from -1, cold, to 1, warm.",
    "nonwords": "A part of gold that costs: share of words that are no English where they stand, 0 to 1.",
    "gibberish": "A part of gold that costs: how unlikely the text is to the untouched base model, 0 to 1.",
}
MOST_COLUMNS = 4  # policies that stand side by side in a terminal of 80 characters
WIDE = ("gold", "proxy", "kl", "words")  # what the terminal shows of more policies; the HTML shows all
NARROW = ("gold", "second_opinion", "proxy", "reward", "sigma", "kl", "words", "repetition", "gibberish", "finished")
SAMPLES = 3  # prompts whose answers stand in the terminal


class Row(NamedTuple):
    """One metric of the comparison; a cell per policy."""

    metric: str
    meaning: str
    cells: list[str]
    best: int | None  # the cell to mark


def render(
    evaluation: Evaluation,
    *,
    params: Mapping[str, Json],
    lineage: tuple[Graph, Product] | None,
    facts: Mapping[str, str],
    trained: Mapping[str, Training],
) -> str:
    """Return the report as one HTML file; everything in it that others wrote is escaped and made visible.

    lineage: the graph, and the product in it whose ancestry is shown. trained: how each policy's training went, for
    those that were watched.
    """
    from rrlhf.tools.lineage.text import (  # here, so that the terminal table does not wait for it
        branches,
        details,
        line,
    )

    looks, stand = _looks(evaluation), standings(evaluation, trained)
    return page(
        "report.html.j2",
        evaluation=evaluation,
        profile=evaluation.get("profile"),
        rewards={policy["name"]: reward_in_words(policy) for policy in evaluation["policies"]},
        standings=stand,
        headline=headline(stand),
        verdict=verdict(evaluation),
        scales=scales(evaluation),
        has_gold=bool(measured(evaluation, "gold")),
        rows=_comparison(evaluation),
        looks=looks,
        arms=[policy["name"] for policy in evaluation["policies"] if policy["reward"] != "none"],
        only_ppo=all(policy.get("method", "ppo") == "ppo" for policy in evaluation["policies"]),
        curved=list(plots.courses(evaluation["curves"])),
        selecting=list(dict.fromkeys(point["policy"] for point in evaluation.get("selection", []))),
        selection=plots.selection_charts(evaluation.get("selection", []), looks),
        progress=plots.progress_charts(evaluation["curves"], looks, _heldout_sigma(evaluation)),
        heads=plots.head_charts(evaluation["curves"], looks),
        trained=trained,
        watched=trainings.charts(trained, looks),
        excerpts={name: _by_prompt(rows) for name, rows in evaluation.get("excerpts", {}).items()},
        reward_charts=reward_plots.charts(evaluation["reward_models"]),
        measured=in_figures,
        known=known,
        facts=facts,
        branches=branches(*lineage) if lineage else [],
        line=line,
        details=details,
        params=yaml.safe_dump(dict(params), sort_keys=False, allow_unicode=True),
    )


def table(evaluation: Evaluation) -> Table:
    """Return the comparison for the terminal: mean ± standard error, the best gold in bold.

    A few policies are columns; more of them are rows, since a terminal is only so wide.
    """
    policies, rows = evaluation["policies"], _comparison(evaluation)
    shown = Table(title="mean ± standard error over prompts", title_justify="left")
    shown.add_column("", no_wrap=True)
    if len(policies) <= MOST_COLUMNS:
        for policy in policies:
            shown.add_column(Text(f"{visible(policy['name'])}\n{visible(reward_in_words(policy))}"), justify="right")
        for row in rows:
            if row.metric in NARROW or row.metric not in METRICS:
                shown.add_row(Text(visible(row.metric)), *(_cell(row, i) for i in range(len(policies))))
        return shown
    columns = [row for row in rows if row.metric in WIDE]
    for row in columns:
        shown.add_column(Text(visible(row.metric)), justify="right", no_wrap=True)
    for i, policy in enumerate(policies):
        shown.add_row(Text(visible(policy["name"])), *(_cell(row, i) for row in columns))
    return shown


def samples(evaluation: Evaluation) -> Table:
    """Return what every policy answered to the first prompts, for the terminal."""
    judged = any("gold" in answer for sample in evaluation["samples"] for answer in sample["responses"].values())
    shown = Table(title="the same prompts, answered by each", title_justify="left", show_header=False, expand=True)
    shown.add_column(no_wrap=True)
    shown.add_column(ratio=1)
    shown.add_column(justify="right", no_wrap=True)
    for sample in evaluation["samples"][:SAMPLES]:
        shown.add_row("", Text(visible(sample["prompt"]), style="bold"), "gold" if judged else "")
        for name, answer in sample["responses"].items():
            gold = in_figures({"mean": answer["gold"], "stderr": math.nan, "n": 1}) if "gold" in answer else ""
            shown.add_row(Text(visible(name)), Text(visible(" ".join(answer["text"].split()))), gold)
        shown.add_section()
    return shown


def _cell(row: Row, policy: int) -> Text:
    return Text(row.cells[policy], style="bold" if policy == row.best else "")


def reward_in_words(policy: Policy) -> str:
    """Say which reward trained a policy; a mixture names both weights."""
    reward, settings = policy["reward"], dict(policy["settings"])
    plain = {
        "none": "the start",
        "preferences": "DPO: the preferences, no reward model",
        "single": "one reward head",
        "constant": "no reward",
    }
    words = plain.get(reward, f"{reward} of heads").replace("_", " ")
    if "nominal_weight" in settings:
        weight = settings.pop("nominal_weight")
        words = f"{weight:g} most confident + {1 - weight:g} minimum" + (" of the batch" if "batch" in reward else "")
    functions = "".join(f" {weight:+g} {path}" for path, weight in sorted(policy.get("functions", {}).items()))
    if functions and reward == "constant":
        words, functions = functions.strip(), ""
    if "n" in policy:
        words = f"best of {policy['n']} by {words}"
    rest = "".join(f", {name.replace('_', ' ')} {value}" for name, value in settings.items())
    return f"{words}{rest}{functions}"


def known(value: float | None, decimals: int = 3) -> str:
    """Write a number; an undetermined one is a dash."""
    return "–" if value is None else f"{value:z.{decimals}f}"


def _looks(evaluation: Evaluation) -> dict[str, Look]:
    """Give every policy that is named anywhere its colour and shape; the start is grey."""
    start = [policy["name"] for policy in evaluation["policies"] if policy["reward"] == "none"]
    names = [policy["name"] for policy in evaluation["policies"]]
    names += [point["policy"] for point in evaluation["curves"]]
    names += [name for sample in evaluation["samples"] for name in sample["responses"]]
    arms = [name for name in dict.fromkeys(names) if name not in start]
    return dict.fromkeys(start, plots.REFERENCE_LOOK) | plots.arm_looks(arms)


def _by_prompt(excerpts: Sequence[Excerpt]) -> list[list[Excerpt]]:
    return [list(rows) for _, rows in groupby(excerpts, key=lambda row: row["row"])]


def _heldout_sigma(evaluation: Evaluation) -> float | None:
    sigmas = [model["heads"]["sigma"] for model in evaluation["reward_models"] if "heads" in model]
    return sigmas[0] if sigmas else None


def _comparison(evaluation: Evaluation) -> list[Row]:
    """Return a row for every metric that some policy has: first the known ones in order, then any others."""
    present = [metric for policy in evaluation["policies"] for metric in policy["metrics"]]
    names = [policy["name"] for policy in evaluation["policies"]]
    rows = []
    for metric in dict.fromkeys([*(metric for metric in METRICS if metric in present), *present]):
        known = measured(evaluation, metric)
        cells = [in_figures(known[name]) if name in known else "–" for name in names]
        best = names.index(highest(known)) if metric == "gold" and known else None
        if best is not None:
            cells[best] = f"★ {cells[best]}"
        rows.append(Row(metric, _meaning(metric), cells, best))
    return rows


def _meaning(metric: str) -> str:
    function = metric.removeprefix("function_")
    return METRICS.get(metric, f"Value of the reward function {function}." if function != metric else "")
