"""What the numbers of an evaluation say, in sentences that claim no more than the numbers do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rrlhf.judging.content import Measured
from rrlhf.judging.evaluation import Evaluation
from rrlhf.tools.reporting.differences import CLEAR, NEIGHBOURS, Course, Difference, course, difference
from rrlhf.tools.reporting.tables import figures, plus_minus
from rrlhf.tools.reporting.trainings import Training

FEWEST_WORDS = 2 / 3  # of the start's: below it a policy has collapsed into fragments
MOST_RISE = {"repetition": 0.1, "gibberish": 0.1}  # over the start's: above it it has collapsed into noise
TWO_GOLDS = (
    f"Gold while training is the mean over {NEIGHBOURS} updates of the responses to training prompts that were "
    "sampled along the way; gold in the comparison is the finished policy's, on new prompts and with new samples, so "
    "the two need not agree."
)
UNJUDGED = "not judged"
BETTER = "better than the start"
FELL_APART = "scored above the start, but with responses that have collapsed"


class Standing(NamedTuple):
    """One arm against the start, in plain words: the report's first screen."""

    policy: str
    words: str  # "better than the start"
    changes: dict[str, str]  # by metric, with an interval of two standard errors on either side
    warnings: list[str]


def verdict(evaluation: Evaluation) -> list[str]:
    """Return 2 to 5 sentences that the numbers support.

    Differences carry sqrt(s_a^2 + s_b^2) and count as noise below two of those. Policies answer the same prompts, so
    this errs on the careful side where their scores go together.
    """
    golds = evaluation.measured("gold")
    if not golds:
        return _verdict_without_gold(evaluation)
    return [
        *_ends(evaluation, golds, "gold"),
        *(f"That is no improvement of {name}: {told}." for name, told in collapsed(evaluation).items()),
        *_over_optimisation(evaluation),
        *_selection(evaluation),
    ]


def standings(evaluation: Evaluation, trained: Mapping[str, Training]) -> list[Standing]:
    """Return where every arm stands, in the order of the comparison; nothing without a start to compare with."""
    start = evaluation.start
    if start is None:
        return []
    fell_apart, known = collapsed(evaluation), courses(evaluation)
    found = []
    for name in evaluation.arms:
        changes = _changes(evaluation, name, start)
        words = _in_words(changes["gold"]) if "gold" in changes else UNJUDGED
        warnings = [fell_apart[name]] if name in fell_apart else []
        warnings += ["quality fell while the reward rose"] if name in known and known[name].over_optimised else []
        if name in trained:
            warnings += [f"detector: {event.name.replace('_', ' ')}" for event in trained[name].events]
        found.append(
            Standing(
                name,
                FELL_APART if words == BETTER and name in fell_apart else words,
                {metric: change.interval for metric, change in changes.items()},
                list(dict.fromkeys(warnings)),
            )
        )
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
    found = {}
    for name in evaluation.arms:
        told = []
        for metric in ("words", *MOST_RISE):
            known = evaluation.measured(metric)
            if evaluation.start in known and name in known:
                before, now = known[evaluation.start].mean, known[name].mean
                if now < FEWEST_WORDS * before if metric == "words" else now > before + MOST_RISE[metric]:
                    told.append(f"{metric} from {before:.3g} to {now:.3g}")
        if told:
            found[name] = f"its responses have collapsed ({', '.join(told)})"
    return found


def courses(evaluation: Evaluation) -> dict[str, Course]:
    """Return the course of every arm that has enough updates with gold, by name."""
    told = {name: course(points) for name, points in evaluation.courses.items()}
    return {name: found for name, found in told.items() if found}


def _changes(evaluation: Evaluation, name: str, start: str) -> dict[str, Difference]:
    known = {metric: evaluation.measured(metric) for metric in ("gold", "proxy")}
    return {
        metric: difference(values[name], values[start])
        for metric, values in known.items()
        if name in values and start in values
    }


def _in_words(change: Difference) -> str:
    if math.isnan(change.stderr):
        return "not comparable with the start: no standard error"
    if change.is_noise:
        return "not clearly different from the start"
    return BETTER if change.value > 0 else "worse than the start"


def _ends(evaluation: Evaluation, known: Mapping[str, Measured], metric: str) -> list[str]:
    """Say which trained arm ends highest, and which comes next, relative to the start and to each other."""
    start = evaluation.start if evaluation.start in known else None
    ranked = sorted((name for name in known if name != start), key=lambda name: -known[name].mean)
    if not ranked:
        return [
            "There is no trained arm to compare.",
            *(f"{name} has {metric} {figures(known[name])}." for name in known),
        ]
    best, *others = ranked
    highest = f"the highest {metric} of the {len(ranked)} arms: " if others else f"{metric} "
    relative = f", which is {_against(known, best, start)}; {start} has {figures(known[start])}" if start else ""
    said = [f"{best} ends with {highest}{figures(known[best])}{relative}."]
    if others:
        second = others[0]
        gaps = [_against(known, second, name) for name in (best, start) if name]
        said.append(f"{second} comes next with {figures(known[second])}: {', '.join(gaps)}.")
    return said


def _against(known: Mapping[str, Measured], name: str, other: str) -> str:
    return difference(known[name], known[other]).against(other)


def _over_optimisation(evaluation: Evaluation) -> list[str]:
    """Say for which arms gold fell from its own peak while proxy kept rising: at most one sentence for each answer."""
    known = courses(evaluation)
    if not known:
        unknown = "There are too few updates with gold to say whether over-optimisation set in."
        return [unknown] if evaluation.arms else []
    said: dict[str, list[str]] = {"showed": [], "did not show": []}
    for name, found in known.items():
        said["showed" if found.over_optimised else "did not show"].append(f"for {name}: {_told(found)}")
    sentences = [f"Over-optimisation {what} {'; '.join(arms)}." for what, arms in said.items() if arms]
    return [*sentences[:-1], f"{sentences[-1]} {TWO_GOLDS}"]


def _told(course: Course) -> str:
    """Say how gold and proxy went, and what follows: the reason for `Course.over_optimised`."""
    fall, proxy = course.fall, f"from {course.peak_proxy:z.2f} to {course.end_proxy:z.2f}"
    if fall.value == 0:
        return f"gold while training was at its best where it ended ({course.end_gold:z.2f})"
    if math.isnan(fall.stderr):
        what = ", and without a standard error that may be noise"
    elif fall.is_noise:
        what = ", which is within noise"
    elif fall.value <= CLEAR * fall.stderr:
        what = (
            "; chance alone often puts the best of many noisy updates as far above the others, and only "
            f"{CLEAR} standard errors ({CLEAR * fall.stderr:.2f}) would tell"
        )
    elif course.over_optimised:
        what = f", more than chance explains, while the proxy rose {proxy}"
    else:
        what = f", more than chance explains, but the proxy did not rise meanwhile ({proxy})"
    below = plus_minus(fall.value, fall.stderr)
    best = f"its best ({course.peak_gold:z.2f} around update {course.peak_update})"
    return f"gold while training ended at {course.end_gold:z.2f}, {below} below {best}{what}"


def _selection(evaluation: Evaluation) -> list[str]:
    """Say where gold is highest over n, for the arms that choose the best of n; at most one sentence."""
    told = []
    for name, points in evaluation.selections.items():
        golds = {point.n: point.gold for point in points if point.gold}
        if golds:
            first, last, best = min(golds), max(golds), max(golds, key=lambda n: golds[n].mean)
            middle = f", highest at n = {best} ({figures(golds[best])})" if best not in {first, last} else ""
            ends = f"{figures(golds[first])} at n = {first} to {figures(golds[last])} at n = {last}"
            told.append(f"for {name} gold goes from {ends}{middle}")
    return [f"Choosing the best of n: {'; '.join(told)}."] if told else []


def _verdict_without_gold(evaluation: Evaluation) -> list[str]:
    said = [
        "No gold judge read this run: the numbers say what the reward models think of the responses, not whether the "
        "responses became better."
    ]
    proxies, spreads = evaluation.measured("proxy"), evaluation.measured("spread")
    if proxies:
        said += _ends(evaluation, proxies, "proxy")
    if spreads:
        listed = ", ".join(f"{figures(value)} for {name}" for name, value in spreads.items())
        said.append(f"The heads disagree (spread) by {listed}.")
    return said
