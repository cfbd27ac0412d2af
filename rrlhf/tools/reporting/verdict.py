"""What the numbers of an evaluation say, in sentences that claim no more than the numbers do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rrlhf.judging.content import Measured
from rrlhf.judging.evaluation import Evaluation
from rrlhf.tools.reporting.courses import CLEAR, NEIGHBOURS, Course, Training, courses
from rrlhf.tools.reporting.tables import figures, plus_minus

FEWEST_WORDS = 2 / 3  # of the start's: below it a policy has collapsed into fragments
MOST_RISE = {"repetition": 0.1, "gibberish": 0.1}  # over the start's: above it it has collapsed into noise
RULE = (
    f"It is a fall of gold by more than {CLEAR} standard errors from its best, while the proxy rose. Gold while "
    f"training is the mean over {NEIGHBOURS} updates, on training prompts; gold in the comparison is the "
    "finished policy's, on new prompts and with new samples, so the two need not agree."
)
NO_GOLD = (
    "No gold judge read this run: the numbers say what the reward models think of the responses, not whether the "
    "responses became better."
)
UNJUDGED = "not judged"
BETTER = "better than the start"
FELL_APART = "scored above the start, but with responses that have collapsed"


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

    def against(self, name: str) -> str:
        """Say it in words, relative to a policy."""
        if self.is_noise:
            return f"within noise of {name} (difference {plus_minus(self.value, self.stderr, '+')})"
        return f"{plus_minus(abs(self.value), self.stderr)} {'above' if self.value > 0 else 'below'} {name}"


class Standing(NamedTuple):
    """One arm against the start, in plain words: the report's first screen."""

    policy: str
    words: str  # "better than the start"
    changes: dict[str, str]  # by metric, with an interval of two standard errors on either side
    warnings: list[str]


def difference(a: Measured, b: Measured) -> Difference:
    """Return a - b with the standard error for independent estimates."""
    return Difference(a.mean - b.mean, math.hypot(a.stderr, b.stderr))


def verdict(evaluation: Evaluation) -> list[str]:
    """Return the sentences that the numbers support.

    Differences carry sqrt(s_a^2 + s_b^2) and count as noise below two of those. Policies answer the same prompts, so
    this errs on the careful side where their scores go together.
    """
    if not evaluation.measured("gold"):
        return [NO_GOLD, *_ends(evaluation, "proxy")]
    return [
        *_ends(evaluation, "gold"),
        *(f"That is no improvement of {name}: {told}." for name, told in collapsed(evaluation).items()),
        *_over_optimisation(evaluation),
    ]


def standings(evaluation: Evaluation, trained: Mapping[str, Training]) -> list[Standing]:
    """Return where every arm stands, in the order of the comparison; nothing without a start to compare with."""
    start = evaluation.start
    known = {metric: evaluation.measured(metric) for metric in ("gold", "proxy")}
    fell_apart, went = collapsed(evaluation), courses(evaluation)
    found = []
    for name in evaluation.arms if start else ():
        changes = {
            metric: difference(values[name], values[start])
            for metric, values in known.items()
            if name in values and start in values
        }
        words = _in_words(changes["gold"]) if "gold" in changes else UNJUDGED
        warnings = [fell_apart[name]] if name in fell_apart else []
        warnings += ["quality fell while the reward rose"] if name in went and went[name].over_optimised else []
        events = trained[name].events if name in trained else []
        warnings += dict.fromkeys(f"detector: {event.name.replace('_', ' ')}" for event in events)
        words = FELL_APART if words == BETTER and name in fell_apart else words
        found.append(Standing(name, words, {metric: each.interval for metric, each in changes.items()}, warnings))
    return found


def headline(standings: Sequence[Standing]) -> str:
    """Say in one sentence which arms are better than the start, and which are not."""
    groups: dict[str, list[str]] = {}
    for standing in standings:
        groups.setdefault(standing.words, []).append(standing.policy)
    if {*groups} <= {UNJUDGED}:
        return "No independent judge read this run: whether the responses became better is not known."
    told = [
        f"{' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))} {'are' if names[1:] else 'is'} {words}"
        for words, names in groups.items()
    ]
    return f"By the independent judge, {'; '.join(told)}."


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


def _in_words(change: Difference) -> str:
    if change.is_noise:
        return "not clearly different from the start"
    return BETTER if change.value > 0 else "worse than the start"


def _ends(evaluation: Evaluation, metric: str) -> list[str]:
    """Say which trained arm ends highest, and which comes next, relative to each other and to the start."""
    known = evaluation.measured(metric)
    ranked = sorted((name for name in evaluation.arms if name in known), key=lambda name: -known[name].mean)
    said = []
    for name, how in zip(ranked, (f"ends highest, with {metric}", "comes next, with"), strict=False):
        others = [other for other in (ranked[0], evaluation.start) if other in known and other != name]
        gaps = ", ".join(difference(known[name], known[other]).against(other) for other in others)
        said.append(f"{name} {how} {figures(known[name])}{gaps and ': '}{gaps}.")
    return said or ["There is no trained arm to compare."]


def _over_optimisation(evaluation: Evaluation) -> list[str]:
    """Say for which arms gold fell from its own peak while proxy kept rising: at most one sentence for each answer."""
    known = courses(evaluation)
    if not known:
        unknown = "There are too few updates with gold to say whether over-optimisation set in."
        return [unknown] if evaluation.arms else []
    said: dict[str, list[str]] = {"showed": [], "did not show": []}
    for name, found in known.items():
        said["showed" if found.over_optimised else "did not show"].append(f"for {name}: {_told(found)}")
    return [*(f"Over-optimisation {what} {'; '.join(arms)}." for what, arms in said.items() if arms), RULE]


def _told(course: Course) -> str:
    """Say how gold and proxy went."""
    if course.fall == 0:
        return f"gold while training was at its best where it ended ({course.end_gold:z.2f})"
    return (
        f"gold while training ended at {course.end_gold:z.2f}, {plus_minus(course.fall, course.stderr)} below its best "
        f"({course.peak_gold:z.2f} around update {course.peak_update}), and the proxy went from "
        f"{course.peak_proxy:z.2f} to {course.end_proxy:z.2f}"
    )
