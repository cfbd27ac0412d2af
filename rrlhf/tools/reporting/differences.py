"""What can be told from noise: differences of two estimates, and how gold and proxy went while an arm trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Literal, NamedTuple

from rrlhf.judging.content import Measured
from rrlhf.judging.evaluation import Point

CLEAR = 3  # standard errors by which gold has to fall from its best before that counts
NEIGHBOURS = 3  # updates that one smoothed value averages

Quantity = Literal["gold", "proxy", "sigma", "words", "second_opinion", "kl", "update"]


class Difference(NamedTuple):
    """How much higher one estimate is than another, with the standard error of that."""

    value: float
    stderr: float

    @property
    def is_noise(self) -> bool:
        """Less than two standard errors from zero."""
        return abs(self.value) < 2 * self.stderr or self.value == 0

    @property
    def interval(self) -> str:
        """The difference with two standard errors on either side, as text."""
        low, high = self.value - 2 * self.stderr, self.value + 2 * self.stderr
        return f"{self.value:+z.2f}" + ("" if math.isnan(low) else f" ({low:+z.2f} to {high:+z.2f})")

    def against(self, name: str) -> str:
        """Say it in words, relative to a policy."""
        if math.isnan(self.stderr):
            return f"{self.value:+z.2f} relative to {name} (no standard error to judge that by)"
        if self.is_noise:
            return f"within noise of {name} (difference {self.value:+z.2f} ± {self.stderr:.2f})"
        return f"{abs(self.value):.2f} ± {self.stderr:.2f} {'above' if self.value > 0 else 'below'} {name}"


class Course(NamedTuple):
    """Gold and proxy while one arm trained, at gold's peak and at the end, each a mean over neighbouring updates."""

    peak_update: int
    peak_gold: float
    end_gold: float
    fall: Difference  # of gold, from its peak to the end
    peak_proxy: float
    end_proxy: float
    down_at: int | None  # first update after the peak at which gold was clearly below it

    @property
    def over_optimised(self) -> bool:
        """Gold fell by more than chance allows while proxy kept rising (Gao et al. 2022, arXiv 2210.10760).

        The peak is the best of many updates: of flat courses of 40 updates, 22 % fall by two standard errors and
        2 % by three (simulated).
        """
        return self.fall.value > CLEAR * self.fall.stderr and self.end_proxy > self.peak_proxy


def difference(a: Measured, b: Measured) -> Difference:
    """Return a - b with the standard error for independent estimates."""
    return Difference(a.mean - b.mean, math.hypot(a.stderr, b.stderr))


def course(points: Sequence[Point]) -> Course | None:
    """Return how gold and proxy went over the updates of one arm; None with too few that have gold."""
    points = having(points, "gold", "proxy")
    if len(points) <= NEIGHBOURS:
        return None
    golds, proxies = smoothed(points, "gold"), smoothed(points, "proxy")
    stderrs, updates = gold_stderrs(points), [round(update) for update in smoothed(points, "update")]
    peak = golds.index(max(golds))
    falls = [
        Difference(golds[peak] - gold, math.hypot(stderrs[peak], stderr))
        for gold, stderr in zip(golds, stderrs, strict=True)
    ]
    down = (updates[i] for i in range(peak, len(falls)) if falls[i].value > CLEAR * falls[i].stderr)
    return Course(updates[peak], golds[peak], golds[-1], falls[-1], proxies[peak], proxies[-1], next(down, None))


def having(points: Sequence[Point], *quantities: Quantity) -> list[Point]:
    """Keep the points at which these quantities were measured and are finite."""
    return [point for point in points if all(math.isfinite(_value(point, quantity)) for quantity in quantities)]


def values(points: Sequence[Point], quantity: Quantity) -> list[float]:
    """Return a quantity at every point."""
    return [_value(point, quantity) for point in points]


def smoothed(points: Sequence[Point], quantity: Quantity) -> list[float]:
    """Return a quantity averaged over neighbouring updates."""
    return neighbour_means(values(points, quantity))


def neighbour_means(numbers: Sequence[float]) -> list[float]:
    """Average every NEIGHBOURS numbers in a row; fewer of them give one average of all."""
    return [fmean(window) for window in _windows(numbers)]


def gold_stderrs(points: Sequence[Point]) -> list[float]:
    """Return the standard errors of smoothed gold, for independent updates: sqrt(sum_i s_i^2) / n."""
    stderrs = [math.nan if point.gold_stderr is None else point.gold_stderr for point in points]
    return [math.hypot(*window) / len(window) for window in _windows(stderrs)]


def _value(point: Point, quantity: Quantity) -> float:
    value: float | None = getattr(point, quantity)
    return math.nan if value is None else value


def _windows(numbers: Sequence[float]) -> list[Sequence[float]]:
    starts = range(max(len(numbers) - NEIGHBOURS + 1, min(len(numbers), 1)))
    return [numbers[start : start + NEIGHBOURS] for start in starts]
