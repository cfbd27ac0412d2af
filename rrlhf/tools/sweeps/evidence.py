"""What a sweep over seeds shows: each policy against one of them, seed by seed, and how far each could be optimised.

A policy and its baseline share a seed's data, reward models and prompts, so their difference is taken within the seed
and its interval over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TypedDict

import numpy as np
import torch
from scipy import stats

from rrlhf.judging.calibration import estimate
from rrlhf.tools.reporting.intervals import mean_interval
from rrlhf.tools.reporting.plots import Point, Quantity, neighbour_means
from rrlhf.tools.reporting.verdict import course, difference
from rrlhf.tools.sweeps.comparison import Found, Group, grouped
from rrlhf.types import Json

COMPARED = ("gold", "second_opinion", "gold_at_length", "words")  # metrics of finished policies
AT_EQUAL_KL: dict[Quantity, str] = {"gold": "gold at equal KL", "second_opinion": "second opinion at equal KL"}
WHILE_TRAINING = "gold while training"  # over the last updates, on training prompts
LAST = 5  # updates
WIN_RATE = "win rate"  # share of evaluation prompts with the higher gold; a tie is half


class Paired(TypedDict):
    """One policy less the baseline, by one quantity: the mean over seeds with its 95 % t-interval."""

    policy: str
    settings: dict[str, Json]
    quantity: str
    seeds: int
    difference: float
    low: float | None  # None for a single seed
    high: float | None
    p: float | None  # of no difference, two-sided; of the win rate: of 1/2
    p_holm: float | None  # corrected for the number of policies that this quantity compares (Holm 1979)


class Fit(TypedDict):
    """Gold by distance d = sqrt(KL) while a policy trained: gold = start + d (alpha - beta log d).

    Gao et al. 2022 (arXiv 2210.10760), equation 1, for reinforcement learning; by least squares over all seeds.
    """

    policy: str
    settings: dict[str, Json]
    start: float
    alpha: float
    beta: float
    r_squared: float
    peak: float | None  # distance at which gold is highest; None where it rises without end


class Alarm(TypedDict):
    """How the warning of reward hacking and gold's fall went together, over seeds."""

    policy: str
    settings: dict[str, Json]
    seeds: int
    fell: int  # seeds in which gold fell from its peak while the proxy rose, or ended below the start's
    warned: int  # of these: with a warning before gold was down
    leads: list[int]  # of these: updates from the warning to there
    false: int  # seeds with a warning in which gold did not fall


class Evidence(TypedDict):
    """All of it."""

    baseline: str
    paired: list[Paired]
    fits: list[Fit]
    alarms: list[Alarm]


def evidence(found: Iterable[Found], baseline: str) -> Evidence:
    """Compare every policy that was trained with `baseline`. Those that diverged are left out."""
    known = [one for one in found if one.metrics is not None]
    groups = grouped(known)
    base = [one for one in known if one.policy == baseline]
    paired: list[Paired] = []
    for group in groups:
        if group["policy"] != baseline:
            pairs = [(one, other) for one in group["found"] if (other := _partner(one, base))]
            paired += _paired(group, pairs) if pairs else []
    return {
        "baseline": baseline,
        "paired": _corrected(paired),
        "fits": [fit for group in groups if (fit := _fit(group))],
        "alarms": [_alarm(group, known) for group in groups if group["found"][0].curve],
    }


def at_equal_kl(policy: Sequence[Point], other: Sequence[Point], quantity: Quantity) -> float | None:
    """Return the difference of a quantity where both policies, as they trained, were equally far from the start.

    That is the largest KL that both reached; both are means over neighbouring updates, in order of KL.
    """
    smoothed = []
    for points in (policy, other):
        having = sorted((point for point in points if quantity in point), key=lambda point: point["kl"])
        smoothed.append((neighbour_means([p["kl"] for p in having]), neighbour_means([p[quantity] for p in having])))
    (kl, values), (other_kl, other_values) = smoothed
    if not kl or not other_kl:
        return None
    reached = min(kl[-1], other_kl[-1])
    return float(np.interp(reached, kl, values) - np.interp(reached, other_kl, other_values))


def win_rate(golds: Sequence[float], others: Sequence[float]) -> float:
    """Return the share of prompts at which the first has the higher gold; a tie is half."""
    return sum((a > b) + (a == b) / 2 for a, b in zip(golds, others, strict=True)) / len(golds)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979): the chance of one false finding stays below the level."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, (len(p_values) - rank) * p_values[i])
        corrected[i] = min(largest, 1.0)
    return corrected


def _partner(one: Found, base: Iterable[Found]) -> Found | None:
    """Return the baseline at the same seeds and at what else changes both."""
    return next(
        (b for b in base if all(one.settings.get(path, value) == value for path, value in b.settings.items())), None
    )


def _paired(group: Group, pairs: Sequence[tuple[Found, Found]]) -> list[Paired]:
    differences: dict[str, list[float]] = {}
    for one, base in pairs:
        for name in COMPARED:
            if one.metrics and base.metrics and name in one.metrics and name in base.metrics:
                differences.setdefault(name, []).append(one.metrics[name]["mean"] - base.metrics[name]["mean"])
        for quantity, name in AT_EQUAL_KL.items():
            found = at_equal_kl(one.curve, base.curve, quantity)
            if found is not None:
                differences.setdefault(name, []).append(found)
        lately = [[p["gold"] for p in each.curve[-LAST:] if "gold" in p] for each in (one, base)]
        if all(lately):
            differences.setdefault(WHILE_TRAINING, []).append(fmean(lately[0]) - fmean(lately[1]))
        if one.gold_by_prompt and base.gold_by_prompt:
            differences.setdefault(WIN_RATE, []).append(win_rate(one.gold_by_prompt, base.gold_by_prompt))
    return [_difference(group, name, values) for name, values in differences.items()]


def _difference(group: Group, quantity: str, values: Sequence[float]) -> Paired:
    found = estimate(torch.tensor(values, dtype=torch.float64))
    low, high = mean_interval(found)
    beyond = abs(found.mean - (0.5 if quantity == WIN_RATE else 0.0))
    p = 2 * float(stats.t.sf(beyond / found.stderr, found.n - 1)) if found.stderr > 0 else math.nan
    return {
        "policy": group["policy"],
        "settings": group["settings"],
        "quantity": quantity,
        "seeds": found.n,
        "difference": found.mean,
        "low": None if math.isnan(low) else low,
        "high": None if math.isnan(high) else high,
        "p": None if math.isnan(p) else p,
        "p_holm": None,
    }


def _corrected(rows: list[Paired]) -> list[Paired]:
    for quantity in dict.fromkeys(row["quantity"] for row in rows):
        tested = [row for row in rows if row["quantity"] == quantity and row["p"] is not None]
        for row, p in zip(tested, holm([row["p"] or 0.0 for row in tested]), strict=True):
            row["p_holm"] = p
    return rows


def _fit(group: Group) -> Fit | None:
    points = [p for one in group["found"] for p in one.curve if "gold" in p and p["kl"] > 0]
    if len(points) < 4:
        return None
    d, gold = (np.array(values) for values in zip(*((math.sqrt(p["kl"]), p["gold"]) for p in points), strict=True))
    columns = np.stack([np.ones_like(d), d, -d * np.log(d)], axis=1)
    start, alpha, beta = (float(value) for value in np.linalg.lstsq(columns, gold, rcond=None)[0])
    left = gold - columns @ np.array([start, alpha, beta])
    return {
        "policy": group["policy"],
        "settings": group["settings"],
        "start": start,
        "alpha": alpha,
        "beta": beta,
        "r_squared": float(1 - left.var() / gold.var()) if gold.var() > 0 else math.nan,
        "peak": math.exp(alpha / beta - 1) if beta > 0 else None,
    }


def _down(one: Found, starts: Iterable[Found]) -> int | None:
    """Return the update at which gold was down; the last where only the finished policy shows that it is."""
    went, start = course(one.curve), _partner(one, starts)
    if went and went.over_optimised:
        return went.down_at
    golds = [each.metrics.get("gold") for each in (one, start) if each and each.metrics]
    if len(golds) == 2 and golds[0] and golds[1]:
        change = difference(golds[0], golds[1])
        if change.value < 0 and not change.is_noise:
            return max(point["update"] for point in one.curve)
    return None


def _alarm(group: Group, known: Sequence[Found]) -> Alarm:
    leads, fell, false = [], 0, 0
    for one in group["found"]:
        down = _down(one, [each for each in known if each.policy == "sft"])
        fell += down is not None
        false += one.alarm is not None and down is None
        if one.alarm is not None and down is not None and one.alarm < down:
            leads.append(down - one.alarm)
    return {
        "policy": group["policy"],
        "settings": group["settings"],
        "seeds": len(group["found"]),
        "fell": fell,
        "warned": len(leads),
        "leads": leads,
        "false": false,
    }
