"""What a sweep over seeds shows: each policy against one of them, seed by seed, and how far each could be optimised.

A policy and its baseline share a seed's data, reward models and prompts, so their difference is taken within the seed
and its interval over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import torch
from scipy import stats

from rrlhf.judging.calibration import estimate, mean_interval
from rrlhf.judging.evaluation import Point
from rrlhf.tools.reporting.differences import Quantity, course, difference, having, smoothed, values
from rrlhf.tools.sweeps.comparison import Found, Group, Setting, grouped

COMPARED = ("gold", "second_opinion", "gold_at_length", "words")  # metrics of finished policies
AT_EQUAL_KL: dict[Quantity, str] = {"gold": "gold at equal KL", "second_opinion": "second opinion at equal KL"}
WHILE_TRAINING = "gold while training"  # over the last updates, on training prompts
LAST = 5  # updates
WIN_RATE = "win rate"  # share of evaluation prompts with the higher gold; a tie is half


@dataclass(frozen=True)
class Paired(Setting):
    """One policy less the baseline, by one quantity: the mean over seeds with its 95 % t-interval."""

    quantity: str
    seeds: int
    difference: float
    low: float | None  # None for a single seed
    high: float | None
    p: float | None  # of no difference, two-sided; of the win rate: of 1/2
    p_holm: float | None = None  # corrected for the number of policies that this quantity compares (Holm 1979)


@dataclass(frozen=True)
class Fit(Setting):
    """Gold by distance d = sqrt(KL) while a policy trained: gold = start + d (alpha - beta log d).

    Gao et al. 2022 (arXiv 2210.10760), equation 1, for reinforcement learning; by least squares over all seeds.
    """

    start: float
    alpha: float
    beta: float
    r_squared: float
    peak: float | None  # distance at which gold is highest; None where it rises without end


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
    fits: list[Fit]
    alarms: list[Alarm]


def evidence(found: Iterable[Found], baseline: str) -> Evidence:
    """Compare every policy that was trained with `baseline`. Those that diverged are left out."""
    known = [one for one in found if one.metrics is not None]
    groups = grouped(known)
    trained = [group for group in groups if group.found[0].curve]
    base = [one for one in known if one.policy == baseline]
    paired = [row for group in groups if group.policy != baseline for row in _paired(group, base)]
    return Evidence(
        baseline=baseline,
        paired=_corrected(paired),
        fits=[fit for group in trained if (fit := _fit(group))],
        alarms=[_alarm(group, [one for one in known if one.policy == "sft"]) for group in trained],
    )


def at_equal_kl(policy: Sequence[Point], other: Sequence[Point], quantity: Quantity) -> float | None:
    """Return the difference of a quantity where both policies, as they trained, were equally far from the start.

    That is the largest KL that both reached; both are means over neighbouring updates, in order of KL.
    """
    one, two = (sorted(having(points, quantity), key=lambda point: point.kl) for points in (policy, other))
    if not one or not two:
        return None
    reached = min(smoothed(one, "kl")[-1], smoothed(two, "kl")[-1])
    there, base = (np.interp(reached, smoothed(some, "kl"), smoothed(some, quantity)) for some in (one, two))
    return float(there - base)


def win_rate(golds: Sequence[float], others: Sequence[float]) -> float:
    """Return the share of prompts at which the first has the higher gold; a tie is half."""
    return fmean((a > b) + (a == b) / 2 for a, b in zip(golds, others, strict=True))


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


def _paired(group: Group, base: Sequence[Found]) -> list[Paired]:
    by_quantity: dict[str, list[float]] = {}
    for one in group.found:
        if partner := _partner(one, base):
            for quantity, value in _differences(one, partner).items():
                by_quantity.setdefault(quantity, []).append(value)
    return [_tested(group, quantity, values) for quantity, values in by_quantity.items()]


def _differences(one: Found, base: Found) -> dict[str, float]:
    """Return by how much one policy is above the baseline, by every quantity that both have."""
    ended, started = one.metrics or {}, base.metrics or {}
    told = {name: ended[name].mean - started[name].mean for name in COMPARED if name in ended and name in started}
    for quantity, name in AT_EQUAL_KL.items():
        found = at_equal_kl(one.curve, base.curve, quantity)
        if found is not None:
            told[name] = found
    lately = [values(having(each.curve[-LAST:], "gold"), "gold") for each in (one, base)]
    if all(lately):
        told[WHILE_TRAINING] = fmean(lately[0]) - fmean(lately[1])
    if one.gold_by_prompt and base.gold_by_prompt:
        told[WIN_RATE] = win_rate(one.gold_by_prompt, base.gold_by_prompt)
    return told


def _tested(group: Group, quantity: str, differences: Sequence[float]) -> Paired:
    found = estimate(torch.tensor(differences, dtype=torch.float64))
    low, high = (None if math.isnan(bound) else bound for bound in mean_interval(found))
    beyond = abs(found.mean - (0.5 if quantity == WIN_RATE else 0.0))
    p = 2 * float(stats.t.sf(beyond / found.stderr, found.n - 1)) if found.stderr > 0 else None
    return Paired(group.policy, group.settings, quantity, found.n, found.mean, low, high, p)


def _corrected(rows: list[Paired]) -> list[Paired]:
    """Correct the p-values of each quantity for the number of policies that it compares."""
    by_quantity: dict[str, list[float]] = {}
    for row in rows:
        if row.p is not None:
            by_quantity.setdefault(row.quantity, []).append(row.p)
    corrected = {quantity: iter(holm(p_values)) for quantity, p_values in by_quantity.items()}
    return [row if row.p is None else replace(row, p_holm=next(corrected[row.quantity])) for row in rows]


def _fit(group: Group) -> Fit | None:
    points = [p for one in group.found for p in having(one.curve, "gold") if p.kl > 0]
    if len(points) < 4:
        return None
    d, gold = np.sqrt(values(points, "kl")), np.array(values(points, "gold"))
    columns = np.stack([np.ones_like(d), d, -d * np.log(d)], axis=1)
    fitted = np.linalg.lstsq(columns, gold, rcond=None)[0]
    left = gold - columns @ fitted
    start, alpha, beta = (float(value) for value in fitted)
    r_squared = float(1 - left.var() / gold.var()) if gold.var() > 0 else math.nan
    peak = math.exp(alpha / beta - 1) if beta > 0 else None
    return Fit(group.policy, group.settings, start, alpha, beta, r_squared, peak)


def _alarm(group: Group, starts: Sequence[Found]) -> Alarm:
    down = [_down(one, _partner(one, starts)) for one in group.found]
    warned = [(one.alarm, update) for one, update in zip(group.found, down, strict=True) if one.alarm is not None]
    leads = [update - alarm for alarm, update in warned if update is not None and alarm < update]
    return Alarm(
        policy=group.policy,
        settings=group.settings,
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
