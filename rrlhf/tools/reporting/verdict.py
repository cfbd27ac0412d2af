"""How arms went while they trained, and what an evaluation says, in words that claim no more than its numbers do.

Histories hold times and are part of no digest, so no cached stage may read them: they are read when a report is
written.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rrlhf.judging.content import Measured
from rrlhf.judging.evaluation import Evaluation, Point
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.policy.health import EVENTS, Event
from rrlhf.tools.reporting.tables import plus_minus
from rrlhf.types import Metrics

CLEAR = 3  # standard errors by which gold has to fall from its best before that counts
NEIGHBOURS = 3  # updates that one smoothed value averages

Column = NDArray[np.float64]


FEWEST_WORDS = 2 / 3  # of the start's: below it a policy has collapsed into fragments
MOST_RISE = {"repetition": 0.1, "gibberish": 0.1}  # over the start's: above it it has collapsed into noise
JUDGES = ("gold", "judge_win_rate")  # the first of them that read a run decides
UNJUDGED = "not judged"
BETTER = "better than the start"
FELL_APART = "scored above the start, but with responses that have collapsed"


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


class Difference(NamedTuple):
    """How much higher one estimate is than another, with the standard error of that."""

    value: float
    stderr: float

    @property
    def is_noise(self) -> bool:
        """No more than two standard errors from zero, or without a standard error that could tell."""
        return not abs(self.value) > 2 * self.stderr

    @property
    def interval(self) -> str:
        """The difference with two standard errors on either side, as text."""
        low, high = self.value - 2 * self.stderr, self.value + 2 * self.stderr
        return f"{self.value:+z.2f}" + ("" if math.isnan(low) else f" ({low:+z.2f} to {high:+z.2f})")


class Standing(NamedTuple):
    """One arm against the start, in plain words."""

    policy: str
    words: str  # "better than the start"
    changes: dict[str, str]  # by metric, with an interval of two standard errors on either side
    warnings: list[str]


def difference(a: Measured, b: Measured) -> Difference:
    """Return a - b with the standard error for independent estimates, sqrt(s_a^2 + s_b^2).

    Policies answer the same prompts, so this errs on the careful side where their scores go together.
    """
    return Difference(a.mean - b.mean, math.hypot(a.stderr, b.stderr))


def verdict(evaluation: Evaluation, trained: Mapping[str, Training]) -> list[str]:
    """Return what the numbers say: which arms are better than the start, how the best two differ, and each arm."""
    found = standings(evaluation, trained)
    each = []
    for arm in found:
        changes = [f"{_spoken(metric)} {change}" for metric, change in arm.changes.items()]
        each.append(f"{arm.policy} against the start: {', '.join(changes)}; {'; '.join(arm.warnings) or 'no warning'}.")
    return [*filter(None, [headline(found, evaluation), lead(evaluation), asked(evaluation)]), *each]


def lead(evaluation: Evaluation) -> str:
    """Say how the best arm by the judge, or by proxy without one, compares with the next, if there is one."""
    metric = next(filter(evaluation.measured, JUDGES), "proxy")
    known = evaluation.measured(metric)
    ranked = sorted((arm for arm in evaluation.arms if arm in known), key=lambda arm: -known[arm].mean)
    if len(ranked) < 2:
        return ""
    gap = difference(known[ranked[0]], known[ranked[1]])
    noise = ", which may be noise" if gap.is_noise else ""
    return f"{ranked[0]} has the highest {_spoken(metric)}, {gap.interval} over {ranked[1]}{noise}."


def asked(evaluation: Evaluation) -> str:
    """Say what the judge that the user brought did, and how often in vain; nothing without one."""
    judge = evaluation.judge
    if judge is None:
        return ""
    if judge.requests is None:
        return f"{judge.name} scored each response; the higher score of a response and the start's wins."
    failed = ", ".join(f"{reason} ({count})" for reason, count in judge.failures.items())
    return (
        f"{judge.name} compared each response with the start's, in both orders: {judge.requests} requests, "
        f"{judge.prompt_tokens:,} tokens read and {judge.completion_tokens:,} written; "
        f"{f'left out without a verdict: {failed}' if failed else 'all with a verdict'}."
    )


def standings(evaluation: Evaluation, trained: Mapping[str, Training]) -> list[Standing]:
    """Return where every arm stands, in the order of the comparison; nothing without a start to compare with."""
    start, points, fell_apart = evaluation.start, evaluation.courses, collapsed(evaluation)
    known = {metric: evaluation.measured(metric) for metric in (*JUDGES, "proxy")}
    found = []
    for name in evaluation.arms if start else ():
        changes = {
            metric: difference(values[name], values[start])
            for metric, values in known.items()
            if name in values and start in values
        }
        words = next((_in_words(changes[metric]) for metric in JUDGES if metric in changes), UNJUDGED)
        warnings = [fell_apart[name]] if name in fell_apart else []
        went = course(points.get(name, ()))
        if went and went.over_optimised:
            fall = plus_minus(went.fall, went.stderr)
            warnings.append(
                f"gold fell by {fall} from its best, around update {went.peak_update}, while the reward rose"
            )
        events = trained[name].events if name in trained else []
        warnings += [f"{e.name.replace('_', ' ')} at rollout {e.step} ({e.action})" for e in events]
        words = FELL_APART if words == BETTER and name in fell_apart else words
        found.append(Standing(name, words, {metric: each.interval for metric, each in changes.items()}, warnings))
    return found


def headline(standings: Sequence[Standing], evaluation: Evaluation) -> str:
    """Say in one sentence which arms are better than the start, and which are not."""
    groups: dict[str, list[str]] = {}
    for standing in standings:
        groups.setdefault(standing.words, []).append(standing.policy)
    if not groups:
        return "There is no trained arm to compare with the start."
    if {*groups} == {UNJUDGED}:
        return "No independent judge read this run: whether the responses became better is not known."
    told = [
        f"{' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))} {'are' if names[1:] else 'is'} {words}"
        for words, names in groups.items()
    ]
    own = None if evaluation.measured("gold") else evaluation.judge
    return f"By {f'the judge {own.name}' if own else 'the independent judge'}, {'; '.join(told)}."


def collapsed(evaluation: Evaluation) -> dict[str, str]:
    """Return what collapsed of the policies' responses, in words, by policy: length, variety or fluency.

    No score makes up for that: every judge has its blind spots, and collapsed text is where policies find them.
    """
    found: dict[str, list[str]] = {}
    for metric in ("words", *MOST_RISE):
        known = evaluation.measured(metric)
        for name in evaluation.arms:
            if evaluation.start in known and name in known:
                before, now = known[evaluation.start].mean, known[name].mean
                if now < FEWEST_WORDS * before if metric == "words" else now > before + MOST_RISE[metric]:
                    found.setdefault(name, []).append(f"{metric} from {before:.3g} to {now:.3g}")
    return {name: f"its responses have collapsed ({', '.join(told)})" for name, told in found.items()}


def _spoken(metric: str) -> str:
    return metric.replace("_", " ")


def _in_words(change: Difference) -> str:
    if change.is_noise:
        return "not clearly different from the start"
    return BETTER if change.value > 0 else "worse than the start"
