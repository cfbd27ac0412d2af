"""What a training does about its health: rolls back, ends as diverged, or warns; and when it is saved."""

from __future__ import annotations

import math
import sys

from rrlhf.config import Health
from rrlhf.policy.checkpoint import Checkpoints
from rrlhf.policy.health import DIVERGED, MARK, Event, Finding, findings, hacking_suspected, is_healthy
from rrlhf.policy.learner import Course, Learner, restore, snapshot

NONFINITE = f"{MARK}nonfinite"  # marks the rows that lack what was not finite
ADVICE = "a smaller ppo.learning_rate or a larger ppo.kl_weight may help; docs/metrics.md tells what each name means"


class Guard:
    """Looks at every row of one training, and keeps its checkpoints.

    Only a healthy policy becomes a good checkpoint, so what a rollback returns to was sound when it was saved.
    """

    def __init__(self, learner: Learner, course: Course, checkpoints: Checkpoints, health: Health, name: str) -> None:
        self._learner, self._course, self._checkpoints = learner, course, checkpoints
        self._health, self._name = health, name

    def begin(self) -> None:
        """Save what a rollback before the first checkpoint returns to."""
        if self._course.step == 0:
            self._save(good=True)

    def look(self) -> str | None:
        """Act on the last row of the course; returns why the training must end, or None."""
        course, health = self._course, self._health
        recent = course.rows[max([0, *course.rollbacks]) :]
        start = next((row for row in course.rows if NONFINITE not in row), course.rows[-1])
        ended = None
        for finding in (found := findings(recent, start, health)):
            course.rows[-1][f"{MARK}{finding.name}"] = 1.0
        if found:
            ended = self._roll_back(found)
        elif warning := hacking_suspected([row for row in course.rows if NONFINITE not in row]):
            self._warn(warning)
        _keep_finite(course)
        if not ended and course.update % health.checkpoint_every == 0:
            self._save(good=not found and is_healthy(course.rows[-1], start, health))
        return ended

    def interrupted(self) -> None:
        """Save between two updates, where the run was asked to stop; processes hear of it at different steps."""
        if self._learner.engine.num_processes == 1:
            self._save(good=False)
            self._say(f"saved after update {self._course.update}")

    def _roll_back(self, found: list[Finding]) -> str | None:
        course, health = self._course, self._health
        what = "; ".join(f"{finding.name} ({finding.detail})" for finding in found)
        saved = self._checkpoints.newest(good=True) if len(course.rollbacks) < health.rollbacks else None
        if saved is None:
            course.rows[-1][DIVERGED] = 1.0
            self._tell(found, "ended as DIVERGED")
            tries = len(course.rollbacks)
            tried = f" after {tries} rollback{'s' if tries > 1 else ''}" if tries else ""
            step = course.rows[-1]["step"]
            return f"DIVERGED at step {step:g}{tried}: {what}. Nothing of it is saved or registered; {ADVICE}"
        restore(self._learner, saved)
        before = saved.notes["course"]
        course.update = before["update"]
        course.rollbacks.append(course.step)
        factor = health.rollback_learning_rate ** (len(course.rollbacks) - len(before["rollbacks"]))
        for group in self._learner.optimizer.param_groups:
            group["lr"] *= factor
        self._tell(found, f"rolled back to update {course.update}, learning rate times {factor:g}")
        return None

    def _warn(self, warning: Finding) -> None:
        if all(event.name != warning.name for event in self._course.events):
            self._course.rows[-1][f"{MARK}{warning.name}"] = 1.0
            self._tell([warning], "warned")

    def _tell(self, found: list[Finding], action: str) -> None:
        step = int(self._course.rows[-1]["step"])
        for finding in found:
            self._course.events.append(Event(step, finding.name, finding.detail, action))
            self._say(f"step {step}: {finding.name}: {finding.detail}; {action}")

    def _say(self, text: str) -> None:
        if self._learner.engine.is_main_process:
            print(f"{self._name}: {text}", file=sys.stderr, flush=True)

    def _save(self, good: bool) -> None:
        self._checkpoints.save(self._course.step, snapshot(self._learner, self._course), good)


def _keep_finite(course: Course) -> None:
    """Leave out of the last row what no log can hold."""
    row = course.rows[-1]
    for name in [name for name, value in row.items() if not math.isfinite(value)]:
        del row[name]
