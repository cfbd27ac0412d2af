"""The content of evaluation.json, which the last stage writes and the report reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NotRequired, TypedDict

from rrlhf.judging.content import GoldAgreement, Measured, RewardJudgement
from rrlhf.policy.excerpts import Excerpt
from rrlhf.tools.reporting.plots import Chosen, Point

__all__ = ["Evaluation", "Measured", "Policy", "Response", "Sample", "highest", "in_figures", "measured"]


class Policy(TypedDict):
    """One row of the comparison; `reward` is "none" for the model that every arm starts from."""

    name: str
    settings: dict[str, float]  # of the reward
    reward: str  # "preferences" where there is none (dpo)
    functions: NotRequired[dict[str, float]]  # weight of each reward function, by import path
    method: NotRequired[Literal["ppo", "dpo", "best_of_n"]]
    n: NotRequired[int]  # of best_of_n
    digest: NotRequired[str]
    metrics: dict[str, Measured]
    gold_by_prompt: NotRequired[list[float]]  # of the evaluation prompts in order: what policies are paired by


class Response(TypedDict):
    """One policy's answer to a prompt, with its scores."""

    text: str
    proxy: float
    heads: list[float]
    gold: NotRequired[float]


class Sample(TypedDict):
    """One prompt with the answer of every policy."""

    prompt: str
    responses: dict[str, Response]


class Evaluation(TypedDict):
    """The content of evaluation.json."""

    profile: NotRequired[str]
    policies: list[Policy]
    curves: list[Point]
    selection: NotRequired[list[Chosen]]
    samples: list[Sample]
    excerpts: NotRequired[dict[str, list[Excerpt]]]  # of the responses in training, by policy
    reward_models: list[RewardJudgement]
    gold_agreement: NotRequired[list[GoldAgreement]]


def measured(evaluation: Evaluation, metric: str) -> dict[str, Measured]:
    """Return what is known of a metric, by policy."""
    found = {policy["name"]: policy["metrics"].get(metric) for policy in evaluation["policies"]}
    return {name: value for name, value in found.items() if value and math.isfinite(value["mean"])}


def in_figures(value: Measured) -> str:
    """Write a mean with its standard error."""
    error = "" if math.isnan(value["stderr"]) else f" ± {value['stderr']:.2f}"
    return f"{value['mean']:z.2f}{error}"


def highest(known: Mapping[str, Measured]) -> str:
    """Return the policy with the highest mean."""
    return max(known, key=lambda name: known[name]["mean"])
