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

from rrlhf.judging.evaluation import Evaluation, Point
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
    """Gold and proxy while one arm trained, at gold's peak and at the end, each a mean over neighbouring updates."""

    peak_update: int
    peak_gold: float
    end_gold: float
    stderr: float  # of the fall from one to the other
    peak_proxy: float
    end_proxy: float
    down_at: int | None  # first update after the peak at which gold was clearly below it

    @property
    def fall(self) -> float:
        """By how much gold fell."""
        return self.peak_gold - self.end_gold

    @property
    def over_optimised(self) -> bool:
        """Gold fell by more than chance allows while proxy kept rising (Gao et al. 2022, arXiv 2210.10760).

        The peak is the best of many updates: of flat courses of 40 updates, 22 % fall by two standard errors and
        2 % by three (simulated).
        """
        return self.fall > CLEAR * self.stderr and self.end_proxy > self.peak_proxy


def training(artifact: Artifact) -> Training | None:
    """Read a policy's training; None for one that no detector watched."""
    path = artifact.path / EVENTS
    if not path.is_file():
        return None
    return Training([Event(**event) for event in json.loads(path.read_bytes())], artifact.history())


def health(trainings: Mapping[str, Training]) -> str:
    """Say in one sentence which detectors fired, by arm; nothing where no arm was watched."""
    told = [
        f"{event.name} in {name} at rollout {event.step} ({event.action})"
        for name, training in trainings.items()
        for event in training.events
    ]
    if not trainings:
        return ""
    return f"Health: {'; '.join(told)}." if told else "Health: no detector fired in any training."


def courses(evaluation: Evaluation) -> dict[str, Course]:
    """Return the course of every arm that has enough updates with gold, by name."""
    told = {name: course(points) for name, points in evaluation.courses.items()}
    return {name: found for name, found in told.items() if found}


def course(points: Iterable[Point]) -> Course | None:
    """Return how gold and proxy went over the updates of one arm; None with too few that have gold."""
    update, gold, proxy, each = columns(map(vars, points), "update", "gold", "proxy", "gold_stderr")
    if len(update) <= NEIGHBOURS:
        return None
    update, gold, proxy, stderr = smoothed(update), smoothed(gold), smoothed(proxy), smoothed_stderr(each)
    peak = int(gold.argmax())
    falls, errors = gold[peak] - gold, np.hypot(stderr[peak], stderr)
    down = [round(update[i]) for i in range(peak, len(gold)) if falls[i] > CLEAR * errors[i]]
    return Course(
        peak_update=round(update[peak]),
        peak_gold=float(gold[peak]),
        end_gold=float(gold[-1]),
        stderr=float(errors[-1]),
        peak_proxy=float(proxy[peak]),
        end_proxy=float(proxy[-1]),
        down_at=next(iter(down), None),
    )


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
