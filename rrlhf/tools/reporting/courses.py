"""How arms went while they trained: gold and proxy update by update, and what the health's detectors saw.

Histories hold times and are part of no digest, so no cached stage may read them: they are read when a report is
written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rrlhf.judging.evaluation import Point
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.policy.health import EVENTS, Event
from rrlhf.types import Metrics

CLEAR = 3  # standard errors by which gold has to fall from its best before that counts
NEIGHBOURS = 3  # updates that one smoothed value averages

Column = NDArray[np.float64]


class Training(NamedTuple):
    """One arm's training."""

    events: list[Event]
    rows: list[Metrics]  # one for each rollout


class Course(NamedTuple):
    """Gold and proxy while one arm trained, from gold's peak to the end, each a mean over neighbouring updates."""

    peak_update: int
    fall: float  # of gold
    stderr: float  # of that
    proxy_rise: float
    down_at: int | None  # first update after the peak at which gold was clearly below it

    @property
    def over_optimised(self) -> bool:
        """Gold fell by more than chance allows while proxy kept rising (Gao et al. 2022, arXiv 2210.10760).

        The peak is the best of many updates: of flat courses of 40 updates, 22 % fall by two standard errors and
        2 % by three (simulated).
        """
        return self.fall > CLEAR * self.stderr and self.proxy_rise > 0


def training(artifact: Artifact) -> Training | None:
    """Read a policy's training; None for one that no detector watched."""
    path = artifact.path / EVENTS
    if not path.is_file():
        return None
    return Training([Event(**event) for event in json.loads(path.read_bytes())], artifact.history())


def course(points: Iterable[Point]) -> Course | None:
    """Return how gold and proxy went over the updates of one arm; None with too few that have gold."""
    update, gold, proxy, each = columns(map(vars, points), "update", "gold", "proxy", "gold_stderr")
    if len(update) <= NEIGHBOURS:
        return None
    update, gold, proxy, stderr = smoothed(update), smoothed(gold), smoothed(proxy), smoothed_stderr(each)
    peak = int(gold.argmax())
    falls, errors = gold[peak] - gold, np.hypot(stderr[peak], stderr)
    down = [round(update[i]) for i in range(peak, len(gold)) if falls[i] > CLEAR * errors[i]]
    rise = float(proxy[-1] - proxy[peak])
    return Course(round(update[peak]), float(falls[-1]), float(errors[-1]), rise, next(iter(down), None))


def columns(rows: Iterable[Mapping[str, Any]], *names: str) -> list[Column]:
    """Return these quantities, each of the rows in which all of them are known and finite."""
    table = np.array([[row.get(name) for name in names] for row in rows], dtype=float).reshape(-1, len(names))
    return [*table[np.isfinite(table).all(1)].T]


def smoothed(values: Column) -> Column:
    """Average every NEIGHBOURS values in a row; fewer of them give one average of all."""
    width = min(NEIGHBOURS, len(values))
    return np.convolve(values, np.full(width, 1 / width), "valid") if width else values


def smoothed_stderr(stderr: Column) -> Column:
    """Return the standard errors of smoothed values, of independent updates: sqrt(sum_i s_i^2) / n."""
    return np.sqrt(smoothed(stderr**2) / min(NEIGHBOURS, max(len(stderr), 1)))
