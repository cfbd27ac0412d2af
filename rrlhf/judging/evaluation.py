"""The comparison of policies: what the last stage writes into evaluation.json, and all that is shown of it reads."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from rrlhf.judging.content import GoldAgreement, Measured, RewardJudgement
from rrlhf.types import Metrics

FILE = "evaluation.json"


@dataclass(frozen=True)
class Policy:
    """One policy of the comparison; `reward` is "none" for the model that every arm starts from."""

    name: str
    reward: str  # "preferences" where there is none (dpo)
    settings: dict[str, float]  # of the reward
    metrics: dict[str, Measured]
    functions: dict[str, float] = field(default_factory=dict)  # weight of each reward function, by import path
    method: str | None = None
    n: int | None = None  # of best_of_n
    gold_by_prompt: Sequence[float] = ()  # of the evaluation prompts in order: what policies are paired by


@dataclass(frozen=True)
class Point:
    """One PPO update of one arm: means over the responses that were sampled for it."""

    policy: str
    update: int
    kl: float  # nats per response
    proxy: float
    words: float
    heads: list[float]
    sigma: float | None = None
    second_opinion: float | None = None
    gold: float | None = None
    gold_stderr: float | None = None
    judge_score: float | None = None


@dataclass(frozen=True)
class Chosen:
    """What the best of n gives at one n, by the reward of one arm: unbiased estimates, errors over prompts."""

    policy: str
    n: int
    kl: float  # upper bound, nats per response
    reward: Measured  # what decides
    gold: Measured | None = None


@dataclass(frozen=True)
class Response:
    """One policy's answer to a prompt, with its scores."""

    text: str
    proxy: float
    heads: list[float]
    gold: float | None = None


@dataclass(frozen=True)
class Sample:
    """One prompt with the answer of every policy."""

    prompt: str
    responses: dict[str, Response]


@dataclass(frozen=True)
class Excerpt:
    """One response that a policy gave while it trained; what was not finite is None."""

    update: int
    row: int  # of the ppo table
    prompt: str
    response: str
    finished: bool
    kl: float | None  # log(pi / pi_ref) of the response, nats
    proxy: float | None
    heads: list[float | None]
    gold: float | None = None


@dataclass(frozen=True)
class OwnJudge:
    """The judge that the user brought, and what its verdicts cost."""

    name: str
    requests: int | None = None  # all different, with those of earlier evaluations; None: it is not asked, it scores
    prompt_tokens: int = 0  # as the server counts
    completion_tokens: int = 0
    failures: dict[str, int] = field(default_factory=dict)  # comparisons without a verdict, by reason

    @property
    def costs(self) -> Metrics:
        """What it cost, as metrics; nothing where it is not asked."""
        if self.requests is None:
            return {}
        return {
            "judge_requests": self.requests,
            "judge_prompt_tokens": self.prompt_tokens,
            "judge_completion_tokens": self.completion_tokens,
            "judge_failures": sum(self.failures.values()),
        }


@dataclass(frozen=True)
class Evaluation:
    """The content of evaluation.json."""

    policies: list[Policy]
    curves: list[Point]
    samples: list[Sample]
    reward_models: list[RewardJudgement]
    selection: Sequence[Chosen] = ()
    excerpts: dict[str, list[Excerpt]] = field(default_factory=dict)  # of the responses in training, by policy
    gold_agreement: Sequence[GoldAgreement] = ()
    judge: OwnJudge | None = None

    @property
    def start(self) -> str | None:
        """The name of the model that every arm starts from, if it was read."""
        return next((policy.name for policy in self.policies if policy.reward == "none"), None)

    @property
    def arms(self) -> list[str]:
        """The names of the policies that were made from the start."""
        return [policy.name for policy in self.policies if policy.reward != "none"]

    @property
    def courses(self) -> dict[str, list[Point]]:
        """The points of every policy, in order of updates."""
        points = sorted(self.curves, key=lambda point: point.update)
        names = dict.fromkeys(point.policy for point in self.curves)
        return {name: [point for point in points if point.policy == name] for name in names}

    @property
    def selections(self) -> dict[str, list[Chosen]]:
        """What the best of n gives, by policy, in order of n."""
        names = dict.fromkeys(point.policy for point in self.selection)
        return {name: [point for point in self.selection if point.policy == name] for name in names}

    def measured(self, metric: str) -> dict[str, Measured]:
        """Return what is known of a metric, by policy."""
        found = {policy.name: policy.metrics.get(metric) for policy in self.policies}
        return {name: value for name, value in found.items() if value and math.isfinite(value.mean)}


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write evaluation.json; what there is none of is left out."""
    content = TypeAdapter(Evaluation).dump_python(evaluation, exclude_defaults=True)
    (folder / FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def read_evaluation(folder: Path) -> Evaluation:
    """Read evaluation.json, also one of an earlier version: what it lacks is left at its default."""
    return TypeAdapter(Evaluation).validate_json((folder / FILE).read_bytes())
