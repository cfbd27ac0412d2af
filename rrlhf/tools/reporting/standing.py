"""Where every arm stands, in plain words: the report's first screen, for readers who will not go on to the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rrlhf.tools.reporting.evaluation import Evaluation, Measured, measured
from rrlhf.tools.reporting.trainings import Training
from rrlhf.tools.reporting.verdict import Difference, collapsed, courses, difference, start_of

SHOWN: dict[str, str] = {
    "gold": "The independent judge. To the right is better.",
    "proxy": "The single reward head. Further right than gold would have it: hacking.",
    "spread": "How much the heads disagree. To the right: they are guessing.",
    "words": "Length. A sudden change is a common sign of hacking.",
}
UNJUDGED = "not judged"
BETTER = "better than the start"
FELL_APART = "scored above the start, but with responses that have collapsed"


class Standing(NamedTuple):
    """One arm against the start."""

    policy: str
    words: str  # "better than the start"
    changes: dict[str, str]  # by metric, with an interval of two standard errors on either side
    warnings: list[str]


class Bar(NamedTuple):
    """One policy's interval; places are percent of the width."""

    policy: str
    low: float
    middle: float
    high: float
    told: str


class Scale(NamedTuple):
    """Every policy's interval on one scale."""

    metric: str
    description: str
    bars: list[Bar]
    start: float | None  # where the start lies, percent


def standings(evaluation: Evaluation, trained: Mapping[str, Training]) -> list[Standing]:
    """Return where every arm stands, in the order of the comparison; nothing without a start to compare with."""
    start = start_of(evaluation)
    if start is None:
        return []
    fell_apart = collapsed(evaluation)
    hacked = {name for name, course in courses(evaluation).items() if course.over_optimised}
    golds = measured(evaluation, "gold")
    found = []
    for policy in evaluation["policies"]:
        name = policy["name"]
        if name == start:
            continue
        judged = name in golds and start in golds
        words = _in_words(difference(golds[name], golds[start])) if judged else UNJUDGED
        if words == BETTER and name in fell_apart:
            words = FELL_APART
        warnings = [fell_apart[name]] if name in fell_apart else []
        warnings += ["quality fell while the reward rose"] if name in hacked else []
        warnings += (
            [f"detector: {event.name.replace('_', ' ')}" for event in trained[name].events] if name in trained else []
        )
        found.append(Standing(name, words, _changes(evaluation, name, start), list(dict.fromkeys(warnings))))
    return found


def headline(standings: Sequence[Standing]) -> str:
    """Say in one sentence which arms are better than the start, and which are not."""
    groups: dict[str, list[str]] = {}
    for standing in standings:
        groups.setdefault(standing.words, []).append(standing.policy)
    if {*groups} <= {UNJUDGED}:
        return "No independent judge read this run: whether the responses became better is not known."
    told = [f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {words}" for words, names in groups.items()]
    return f"By the independent judge, {'; '.join(told)}."


def scales(evaluation: Evaluation) -> list[Scale]:
    """Return every policy's mean with two standard errors on either side, for the metrics that tell most."""
    start = start_of(evaluation)
    found = []
    for metric, description in SHOWN.items():
        known = measured(evaluation, metric)
        if len(known) > 1:
            found.append(_scale(metric, description, known, start))
    return found


def _scale(metric: str, description: str, known: Mapping[str, Measured], start: str | None) -> Scale:
    ends = {name: (value["mean"] - _wide(value), value["mean"] + _wide(value)) for name, value in known.items()}
    least, most = min(low for low, _ in ends.values()), max(high for _, high in ends.values())
    margin = 0.05 * (most - least) or 1.0

    def place(number: float) -> float:
        return round(100 * (number - least + margin) / (most - least + 2 * margin), 2)

    bars = [
        Bar(name, place(ends[name][0]), place(value["mean"]), place(ends[name][1]), _interval(value, *ends[name]))
        for name, value in known.items()
    ]
    at = place(known[start]["mean"]) if start is not None and start in known else None
    return Scale(metric, description, bars, at)


def _wide(value: Measured) -> float:
    return 0.0 if math.isnan(value["stderr"]) else 2 * value["stderr"]


def _interval(value: Measured, low: float, high: float) -> str:
    return f"{value['mean']:z.2f}" + (f" ({low:z.2f} to {high:z.2f})" if high > low else "")


def _in_words(change: Difference) -> str:
    if math.isnan(change.stderr):
        return "not comparable with the start: no standard error"
    if change.is_noise:
        return "not clearly different from the start"
    return BETTER if change.value > 0 else "worse than the start"


def _changes(evaluation: Evaluation, name: str, start: str) -> dict[str, str]:
    told = {}
    for metric in ("gold", "proxy"):
        known = measured(evaluation, metric)
        if name in known and start in known:
            change = difference(known[name], known[start])
            low, high = change.value - 2 * change.stderr, change.value + 2 * change.stderr
            told[metric] = f"{change.value:+z.2f}" + ("" if math.isnan(low) else f" ({low:+z.2f} to {high:+z.2f})")
    return told


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
