"""What a sweep found: one row for each setting of each policy, with intervals over seeds or prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from rrlhf.judging.calibration import estimate, mean_interval
from rrlhf.judging.content import Measured
from rrlhf.judging.evaluation import Point
from rrlhf.tools.reporting.comparison import METRICS
from rrlhf.types import Json


class Found(NamedTuple):
    """One policy at one point; no numbers where its training diverged."""

    settings: dict[str, Json]  # those that change it
    policy: str
    version: str | None  # "rrlhf-policy/3"
    metrics: dict[str, Measured] | None
    gold_by_prompt: Sequence[float] = ()
    curve: Sequence[Point] = ()  # of its training
    alarm: int | None = None  # the update at which its training was first suspected of reward hacking


@dataclass(frozen=True)
class Setting:
    """One policy at one setting, over seeds: what a row of any table is about."""

    policy: str
    settings: dict[str, Json]  # without seeds

    @property
    def name(self) -> str:
        """The policy with the settings that change it."""
        told = (f"{path.rpartition('.')[2]} {_plain(value)}" for path, value in self.settings.items())
        return " ".join(filter(None, [self.policy, ", ".join(told)]))


@dataclass(frozen=True)
class Group(Setting):
    """What was found of it."""

    found: list[Found]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % t-interval; bounds are None where there is one unit only."""

    mean: float
    low: float | None
    high: float | None
    n: int
    over: Literal["seeds", "prompts"]

    @property
    def half(self) -> float:
        """Half of its width; NaN where there is none."""
        return math.nan if self.high is None else self.high - self.mean


@dataclass(frozen=True)
class Row(Setting):
    """One row of the comparison."""

    seeds: int  # points that it is made of
    diverged: int
    versions: list[str]
    metrics: dict[str, Interval]


def is_seed(path: str) -> bool:
    """Whether a swept setting is a seed: its values are repetitions, not settings to compare."""
    return path.rpartition(".")[2] == "seed"


def compared(found: Iterable[Found]) -> list[Row]:
    """Return a row for each policy and setting, seeds together."""
    return [_row(group) for group in grouped(found)]


def grouped(found: Iterable[Found]) -> list[Group]:
    """Gather what was found by policy and setting, seeds together; a policy's settings stand together, in order."""
    groups: dict[str, Group] = {}
    for one in found:
        settings = {path: value for path, value in one.settings.items() if not is_seed(path)}
        groups.setdefault(f"{one.policy} {settings!r}", Group(one.policy, settings, [])).found.append(one)
    policies = list(dict.fromkeys(group.policy for group in groups.values()))
    return sorted(groups.values(), key=lambda group: policies.index(group.policy))


def primary(rows: Iterable[Row]) -> str:
    """Return the metric that decides: gold where there is a judge."""
    return "gold" if any("gold" in row.metrics for row in rows) else "proxy"


def _row(group: Group) -> Row:
    known = [one.metrics for one in group.found if one.metrics is not None]
    measured = {name: [metrics[name] for metrics in known if name in metrics] for name in METRICS}
    return Row(
        policy=group.policy,
        settings=group.settings,
        seeds=len(group.found),
        diverged=len(group.found) - len(known),
        versions=[one.version for one in group.found if one.version],
        metrics={name: _interval(values) for name, values in measured.items() if values},
    )


def _interval(measured: Sequence[Measured]) -> Interval:
    """Return the interval over seeds where there are several, else the one over prompts."""
    several = len(measured) > 1
    means = torch.tensor([one.mean for one in measured], dtype=torch.float64)
    found = estimate(means) if several else measured[0]
    low, high = mean_interval(found)
    over: Literal["seeds", "prompts"] = "seeds" if several else "prompts"
    if math.isnan(low):
        return Interval(found.mean, None, None, found.n, over)
    return Interval(found.mean, low, high, found.n, over)


def _plain(value: Json) -> str:
    return value if isinstance(value, str) else json.dumps(value)
