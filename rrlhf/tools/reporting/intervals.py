"""Intervals of means over few units: prompts, or seeds."""

from __future__ import annotations

import math

from scipy import stats

from rrlhf.judging.calibration import Estimate, Interval


def mean_interval(found: Estimate, level: float = 0.95) -> Interval:
    """Return the t-interval of an estimated mean (Student 1908), mean ± t_{n-1} stderr; NaN for a single unit."""
    if found.n < 2:
        return Interval(math.nan, math.nan)
    half = float(stats.t.ppf((1 + level) / 2, found.n - 1)) * found.stderr
    return Interval(found.mean - half, found.mean + half)
