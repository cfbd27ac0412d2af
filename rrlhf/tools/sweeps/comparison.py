"""What a sweep found: a row for each setting of each policy, and each policy against one of them, seed by seed.

A policy and its baseline share a seed's data, reward models and prompts, so their difference is taken within the seed
and its interval over seeds.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from rrlhf.judging.calibration import estimate, mean_interval
from rrlhf.judging.content import Measured
from rrlhf.judging.evaluation import Point
from rrlhf.tools.reporting.comparison import METRICS
from rrlhf.tools.reporting.verdict import columns, course, difference, smoothed
from rrlhf.types import Json

COMPARED = ("gold", "second_opinion", "judge_win_rate", "gold_at_length", "words")  # metrics of finished policies
AT_EQUAL_KL = {"gold": "gold at equal KL", "second_opinion": "second opinion at equal KL"}
WIN_RATE = "win rate"  # share of evaluation prompts with the higher gold; a tie is half


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


@dataclass(frozen=True)
class Paired(Setting):
    """One policy less the baseline, by one quantity: the mean over seeds with its 95 % t-interval."""

    quantity: str
    seeds: int
    difference: float
    low: float  # NaN for a single seed
    high: float
    p: float | None  # of no difference, two-sided; of the win rate: of 1/2
    p_holm: float | None = None  # corrected for the number of policies that this quantity compares (Holm 1979)


@dataclass(frozen=True)
class Alarm(Setting):
    """How the warning of reward hacking and gold's fall went together, over seeds."""

    seeds: int
    fell: int  # seeds in which gold fell from its peak while the proxy rose, or ended below the start's
    warned: int  # of these: with a warning before gold was down
    leads: list[int]  # of these: updates from the warning to there
    false: int  # seeds with a warning in which gold did not fall


@dataclass(frozen=True)
class Evidence:
    """All of it."""

    baseline: str
    paired: list[Paired]
    alarms: list[Alarm]


def evidence(found: Iterable[Found], baseline: str) -> Evidence:
    """Compare every policy with `baseline`. Those that diverged are left out."""
    known = [one for one in found if one.metrics is not None]
    base, starts = ([one for one in known if one.policy == name] for name in (baseline, "sft"))
    groups = grouped(known)
    paired = [row for group in groups if group[0].policy != baseline for row in _paired(group, base)]
    alarms = [_alarm(group, starts) for group in groups if group[0].curve]
    return Evidence(baseline, _corrected(paired), alarms)


def at_equal_kl(policy: Iterable[Point], other: Iterable[Point], quantity: str) -> float | None:
    """Return the difference of a quantity where both policies, as they trained, were equally far from the start.

    That is the largest KL that both reached; both are means over neighbouring updates, in order of KL.
    """
    curves = []
    for points in (policy, other):
        kl, values = columns(map(vars, points), "kl", quantity)
        order = kl.argsort(kind="stable")
        curves.append((smoothed(kl[order]), smoothed(values[order])))
    if not all(kl.size for kl, _ in curves):
        return None
    reached = min(kl[-1] for kl, _ in curves)
    there, base = (np.interp(reached, *curve) for curve in curves)
    return float(there - base)


def win_rate(golds: Sequence[float], others: Sequence[float]) -> float:
    """Return the share of prompts at which the first has the higher gold; a tie is half."""
    return float(np.heaviside(np.subtract(golds, others), 0.5).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979): the chance of one false finding stays below the level."""
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    factors = np.arange(len(p_values), 0, -1)
    corrected[order] = np.maximum.accumulate(factors * np.asarray(p_values)[order]).clip(max=1)
    return [float(p) for p in corrected]


def _partner(one: Found, others: Iterable[Found]) -> Found | None:
    """Return the policy at the same seeds and at what else changes both."""
    return next(
        (b for b in others if all(one.settings.get(path, value) == value for path, value in b.settings.items())), None
    )


def _paired(group: Sequence[Found], base: Sequence[Found]) -> list[Paired]:
    by_quantity: dict[str, list[float]] = {}
    for one in group:
        if partner := _partner(one, base):
            for quantity, value in _differences(one, partner).items():
                by_quantity.setdefault(quantity, []).append(value)
    rows = []
    for quantity, differences in by_quantity.items():
        found = over_seeds(torch.tensor(differences, dtype=torch.float64))
        p = None
        if np.ptp(differences) > 0:
            p = float(stats.ttest_1samp(differences, 0.5 if quantity == WIN_RATE else 0.0).pvalue)
        setting = group[0].setting
        rows.append(Paired(setting.policy, setting.settings, quantity, found.n, found.mean, found.low, found.high, p))
    return rows


def _differences(one: Found, base: Found) -> dict[str, float]:
    """Return by how much one policy is above the baseline, by every quantity that both have."""
    ended, other = one.metrics or {}, base.metrics or {}
    told = {name: ended[name].mean - other[name].mean for name in COMPARED if name in ended and name in other}
    for quantity, name in AT_EQUAL_KL.items():
        found = at_equal_kl(one.curve, base.curve, quantity)
        if found is not None:
            told[name] = found
    if one.gold_by_prompt and base.gold_by_prompt:
        told[WIN_RATE] = win_rate(one.gold_by_prompt, base.gold_by_prompt)
    return told


def _corrected(rows: list[Paired]) -> list[Paired]:
    """Correct the p-values of each quantity for the number of policies that it compares."""
    corrected = {
        quantity: iter(holm([row.p for row in rows if row.quantity == quantity and row.p is not None]))
        for quantity in {row.quantity for row in rows}
    }
    return [row if row.p is None else replace(row, p_holm=next(corrected[row.quantity])) for row in rows]


def _alarm(group: Sequence[Found], starts: Sequence[Found]) -> Alarm:
    down = [_down(one, _partner(one, starts)) for one in group]
    warned = [(one.alarm, update) for one, update in zip(group, down, strict=True) if one.alarm is not None]
    leads = [update - alarm for alarm, update in warned if update is not None and alarm < update]
    return Alarm(
        **vars(group[0].setting),
        seeds=len(down),
        fell=sum(update is not None for update in down),
        warned=len(leads),
        leads=leads,
        false=sum(update is None for _, update in warned),
    )


def _down(one: Found, start: Found | None) -> int | None:
    """Return the update at which gold was down; the last where only the finished policy shows that it is."""
    went = course(one.curve)
    if went and went.over_optimised:
        return went.down_at
    golds = [each.metrics["gold"] for each in (one, start) if each and each.metrics and "gold" in each.metrics]
    if len(golds) == 2:
        change = difference(*golds)
        if change.value < 0 and not change.is_noise:
            return max(point.update for point in one.curve)
    return None
