"""What a sweep found: one row for each setting of each policy, with intervals over seeds or prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypedDict

import torch

from rrlhf.judging.calibration import Estimate, estimate
from rrlhf.judging.content import Measured
from rrlhf.tools.reporting.intervals import mean_interval
from rrlhf.tools.reporting.plots import Point
from rrlhf.types import Json

METRICS = (
    "gold", "second_opinion", "gold_at_length", "proxy", "reward", "sigma", "spread", "kl", "words", "repetition",
    "finished",
)  # fmt: skip


class Found(NamedTuple):
    """One policy at one point; no numbers where its training diverged."""

    settings: dict[str, Json]  # those that change it
    policy: str
    version: str | None  # "rrlhf-policy/3"
    metrics: dict[str, Measured] | None
    gold_by_prompt: Sequence[float] = ()
    curve: Sequence[Point] = ()  # of its training
    alarm: int | None = None  # the update at which its training was first suspected of reward hacking


class Group(TypedDict):
    """One policy at one setting, over seeds."""

    policy: str
    settings: dict[str, Json]  # without seeds
    found: list[Found]


class Interval(TypedDict):
    """A mean with its 95 % t-interval; bounds are None where there is one unit only."""

    mean: float
    low: float | None
    high: float | None
    n: int
    over: Literal["seeds", "prompts"]


class Row(TypedDict):
    """One row of the comparison."""

    policy: str
    settings: dict[str, Json]  # without seeds
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
        told = {path: value for path, value in one.settings.items() if not is_seed(path)}
        group = groups.setdefault(f"{one.policy} {told!r}", {"policy": one.policy, "settings": told, "found": []})
        group["found"].append(one)
    policies = list(dict.fromkeys(group["policy"] for group in groups.values()))
    return sorted(groups.values(), key=lambda group: policies.index(group["policy"]))


def primary(rows: Iterable[Row]) -> str:
    """Return the metric that decides: gold where there is a judge."""
    return "gold" if any("gold" in row["metrics"] for row in rows) else "proxy"


def _row(group: Group) -> Row:
    found = group["found"]
    known = [one.metrics for one in found if one.metrics is not None]
    names = [name for name in METRICS if any(name in metrics for metrics in known)]
    return {
        "policy": group["policy"],
        "settings": group["settings"],
        "seeds": len(found),
        "diverged": len(found) - len(known),
        "versions": [one.version for one in found if one.version],
        "metrics": {name: _interval([metrics[name] for metrics in known if name in metrics]) for name in names},
    }


def _interval(measured: Sequence[Measured]) -> Interval:
    """Return the interval over seeds where there are several, else the one over prompts."""
    if len(measured) > 1:
        found = estimate(torch.tensor([one["mean"] for one in measured], dtype=torch.float64))
        return _with_bounds(found, "seeds")
    [only] = measured
    return _with_bounds(Estimate(only["mean"], only["stderr"], only["n"]), "prompts")


def _with_bounds(found: Estimate, over: Literal["seeds", "prompts"]) -> Interval:
    low, high = mean_interval(found)
    known = not math.isnan(low)
    return {
        "mean": found.mean,
        "low": low if known else None,
        "high": high if known else None,
        "n": found.n,
        "over": over,
    }
