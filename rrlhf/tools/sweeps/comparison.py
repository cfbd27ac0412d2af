"""What a sweep found: one row for each setting of each policy, with intervals over seeds or prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rrlhf.judging.calibration import estimate, mean_interval
from rrlhf.judging.content import Measured
from rrlhf.judging.evaluation import Point
from rrlhf.tools.reporting.comparison import METRICS
from rrlhf.types import Json


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % t-interval; bounds are NaN where there is one unit only."""

    mean: float
    low: float
    high: float
    n: int
    over: Literal["seeds", "prompts"]

    @property
    def half(self) -> float:
        """Half of its width."""
        return self.high - self.mean


@dataclass(frozen=True)
class Setting:
    """One policy at one setting: what a row of any table is about."""

    policy: str
    settings: dict[str, Json]  # those that change it, without seeds

    @property
    def name(self) -> str:
        """The policy with the settings that change it."""
        told = (
            f"{path.rpartition('.')[2]} {value if isinstance(value, str) else json.dumps(value)}"
            for path, value in self.settings.items()
        )
        return " ".join(filter(None, [self.policy, ", ".join(told)]))


class Found(NamedTuple):
    """One policy at one point; no numbers where its training diverged."""

    settings: dict[str, Json]  # those that change it
    policy: str
    version: str | None  # "rrlhf-policy/3"
    metrics: dict[str, Measured] | None
    gold_by_prompt: Sequence[float] = ()
    curve: Sequence[Point] = ()  # of its training
    alarm: int | None = None  # the update at which its training was first suspected of reward hacking

    @property
    def setting(self) -> Setting:
        """What it is compared by: values of a seed are repetitions, not settings to compare."""
        return Setting(self.policy, {path: v for path, v in self.settings.items() if path.split(".")[-1] != "seed"})


@dataclass(frozen=True)
class Row(Setting):
    """One row of the comparison."""

    seeds: int  # points that it is made of
    diverged: int
    versions: list[str]
    metrics: dict[str, Interval]


def compared(found: Iterable[Found]) -> list[Row]:
    """Return a row for each policy and setting, seeds together."""
    rows = []
    for group in grouped(found):
        known = [one.metrics for one in group if one.metrics is not None]
        measured = {name: [metrics[name] for metrics in known if name in metrics] for name in METRICS}
        rows.append(
            Row(
                **vars(group[0].setting),
                seeds=len(group),
                diverged=len(group) - len(known),
                versions=[one.version for one in group if one.version],
                metrics={name: _interval(values) for name, values in measured.items() if values},
            )
        )
    return rows


def grouped(found: Iterable[Found]) -> list[list[Found]]:
    """Gather what was found by policy and setting, seeds together; a policy's settings stand together, in order."""
    groups: dict[str, dict[str, list[Found]]] = {}
    for one in found:
        groups.setdefault(one.policy, {}).setdefault(one.setting.name, []).append(one)
    return [group for of_policy in groups.values() for group in of_policy.values()]


def over_seeds(means: Tensor) -> Interval:
    """Return the interval over seeds, each of them one unit."""
    found = estimate(means)
    return Interval(found.mean, *mean_interval(found), found.n, "seeds")


def _interval(measured: Sequence[Measured]) -> Interval:
    """Return the interval over seeds where there are several, else the one over prompts."""
    if len(measured) > 1:
        return over_seeds(torch.tensor([one.mean for one in measured], dtype=torch.float64))
    [one] = measured
    return Interval(one.mean, *mean_interval(one), one.n, "prompts")
