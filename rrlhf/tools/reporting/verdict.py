"""What the numbers of an evaluation say, in sentences that claim no more than the numbers do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rrlhf.tools.reporting import plots
from rrlhf.tools.reporting.evaluation import Evaluation, Measured, in_figures, measured
from rrlhf.tools.reporting.plots import Point

CLEAR = 3  # standard errors by which gold has to fall from its best before that counts
FEWEST_WORDS = 2 / 3  # of the start's: below it a policy has collapsed into fragments
MOST_RISE = {"repetition": 0.1, "gibberish": 0.1}  # over the start's: above it it has collapsed into noise
TWO_GOLDS = (
    f"Gold while training is the mean over {plots.NEIGHBOURS} updates of the responses to training prompts that were "
    "sampled along the way; gold in the comparison is the finished policy's, on new prompts and with new samples, so "
    "the two need not agree."
)


class Difference(NamedTuple):
    """How much higher one estimate is than another, with the standard error of that."""

    value: float
    stderr: float

    @property
    def is_noise(self) -> bool:
        """Less than two standard errors from zero."""
        return abs(self.value) < 2 * self.stderr or self.value == 0

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


def verdict(evaluation: Evaluation) -> list[str]:
    """Return 2 to 5 sentences that the numbers support.

    Differences carry sqrt(s_a^2 + s_b^2) and count as noise below two of those. Policies answer the same prompts, so
    this errs on the careful side where their scores go together.
    """
    golds = measured(evaluation, "gold")
    if not golds:
        return _verdict_without_gold(evaluation)
    return [
        *_ends(evaluation, golds, "gold"),
        *(f"That is no improvement of {name}: {told}." for name, told in collapsed(evaluation).items()),
        *_over_optimisation(evaluation),
        *_selection(evaluation),
    ]


def collapsed(evaluation: Evaluation) -> dict[str, str]:
    """Return what collapsed of the policies' responses, in words, by policy: length, variety or fluency.

    No score makes up for that: every judge has its blind spots, and collapsed text is where policies find them.
    """
    start = start_of(evaluation)
    found: dict[str, list[str]] = {}
    for metric in ("words", *MOST_RISE):
        known = {name: value["mean"] for name, value in measured(evaluation, metric).items()}
        before = known.get(start, math.nan) if start else math.nan  # nothing is below or above it
        for name, now in known.items():
            if now < FEWEST_WORDS * before if metric == "words" else now > before + MOST_RISE[metric]:
                found.setdefault(name, []).append(f"{metric} from {before:.3g} to {now:.3g}")
    named = [policy["name"] for policy in evaluation["policies"] if policy["name"] in found]
    return {name: f"its responses have collapsed ({', '.join(found[name])})" for name in named}


def start_of(evaluation: Evaluation) -> str | None:
    """Return the name of the model that every arm starts from, if it was read."""
    return next((policy["name"] for policy in evaluation["policies"] if policy["reward"] == "none"), None)


def courses(evaluation: Evaluation) -> dict[str, Course]:
    """Return the course of every arm that has enough updates with gold, by name."""
    told = {name: course(points) for name, points in plots.courses(evaluation["curves"]).items()}
    return {name: found for name, found in told.items() if found}


def course(points: Sequence[Point]) -> Course | None:
    """Return how gold and proxy went over the updates of one arm; None with too few that have gold.

    The peak is the best of many windows: 40 updates of flat gold fall by more than two errors one time in five.
    """
    points = plots.having(plots.having(points, "gold"), "proxy")
    if len(points) <= plots.NEIGHBOURS:
        return None
    golds = plots.neighbour_means([point["gold"] for point in points])
    stderrs = plots.neighbour_stderrs([point.get("gold_stderr", math.nan) for point in points])
    proxies = plots.neighbour_means([point["proxy"] for point in points])
    updates = [round(update) for update in plots.neighbour_means([point["update"] for point in points])]
    peak = golds.index(max(golds))
    falls = [
        Difference(golds[peak] - gold, math.hypot(stderrs[peak], s)) for gold, s in zip(golds, stderrs, strict=True)
    ]
    down = (updates[i] for i in range(peak, len(falls)) if falls[i].value > CLEAR * falls[i].stderr)
    return Course(updates[peak], golds[peak], golds[-1], falls[-1], proxies[peak], proxies[-1], next(down, None))


def difference(a: Measured, b: Measured) -> Difference:
    """Return a - b with the standard error for independent estimates."""
    return Difference(a["mean"] - b["mean"], math.hypot(a["stderr"], b["stderr"]))


def _ends(evaluation: Evaluation, known: Mapping[str, Measured], metric: str) -> list[str]:
    """Say which trained arm ends highest, and which comes next, relative to the start and to each other."""
    start = start_of(evaluation)
    start = start if start in known else None
    ranked = sorted((name for name in known if name != start), key=lambda name: -known[name]["mean"])
    if not ranked:
        return [
            "There is no trained arm to compare.",
            *(f"{name} has {metric} {in_figures(known[name])}." for name in known),
        ]
    best, *others = ranked
    highest = f"the highest {metric} of the {len(ranked)} arms: " if others else f"{metric} "
    relative = f", which is {_against(known, best, start)}; {start} has {in_figures(known[start])}" if start else ""
    said = [f"{best} ends with {highest}{in_figures(known[best])}{relative}."]
    if others:
        second = others[0]
        gaps = [_against(known, second, name) for name in (best, start) if name]
        said.append(f"{second} comes next with {in_figures(known[second])}: {', '.join(gaps)}.")
    return said


def _against(known: Mapping[str, Measured], name: str, other: str) -> str:
    return difference(known[name], known[other]).against(other)


def _over_optimisation(evaluation: Evaluation) -> list[str]:
    """Say for which arms gold fell from its own peak while proxy kept rising: at most one sentence for each answer."""
    known = courses(evaluation)
    if not known:
        trained = any(policy["reward"] != "none" for policy in evaluation["policies"])
        return ["There are too few updates with gold to say whether over-optimisation set in."] if trained else []
    said: dict[str, list[str]] = {"showed": [], "did not show": []}
    for name, course in known.items():
        said["showed" if course.over_optimised else "did not show"].append(f"for {name}: {_told(course)}")
    sentences = [f"Over-optimisation {what} {'; '.join(arms)}." for what, arms in said.items() if arms]
    return [*sentences[:-1], f"{sentences[-1]} {TWO_GOLDS}"]


def _told(course: Course) -> str:
    """Say how gold and proxy went, and what follows: the reason for `Course.over_optimised`."""
    fall, best = course.fall, f"its best ({course.peak_gold:z.2f} around update {course.peak_update})"
    proxy = f"from {course.peak_proxy:z.2f} to {course.end_proxy:z.2f}"
    if fall.value == 0:
        return f"gold while training was at its best where it ended ({course.end_gold:z.2f})"
    ended = f"gold while training ended at {course.end_gold:z.2f}"
    if math.isnan(fall.stderr):
        return f"{ended}, {fall.value:.2f} below {best}, and without a standard error that may be noise"
    below = f"{fall.value:.2f} ± {fall.stderr:.2f} below {best}"
    if fall.is_noise:
        return f"{ended}, {below}, which is within noise"
    if fall.value <= CLEAR * fall.stderr:
        return (
            f"{ended}, {below}; chance alone often puts the best of many noisy updates as far above the others, and "
            f"only {CLEAR} standard errors ({CLEAR * fall.stderr:.2f}) would tell"
        )
    if course.over_optimised:
        return f"{ended}, {below}, more than chance explains, while the proxy rose {proxy}"
    return f"{ended}, {below}, more than chance explains, but the proxy did not rise meanwhile ({proxy})"


def _selection(evaluation: Evaluation) -> list[str]:
    """Say where gold is highest over n, for the arms that choose the best of n; at most one sentence."""
    curves: dict[str, list[tuple[int, Measured]]] = {}
    for point in evaluation.get("selection", []):
        if "gold" in point:
            curves.setdefault(point["policy"], []).append((point["n"], point["gold"]))
    told = []
    for name, points in curves.items():
        (first, start), (last, end), (best, top) = (
            points[0],
            points[-1],
            max(points, key=lambda point: point[1]["mean"]),
        )
        middle = f", highest at n = {best} ({in_figures(top)})" if best not in {first, last} else ""
        told.append(
            f"for {name} gold goes from {in_figures(start)} at n = {first} to {in_figures(end)} at n = {last}{middle}"
        )
    return [f"Choosing the best of n: {'; '.join(told)}."] if told else []


def _verdict_without_gold(evaluation: Evaluation) -> list[str]:
    said = [
        "No gold judge read this run: the numbers say what the reward models think of the responses, not whether the "
        "responses became better."
    ]
    proxies, spreads = measured(evaluation, "proxy"), measured(evaluation, "spread")
    if proxies:
        said += _ends(evaluation, proxies, "proxy")
    if spreads:
        listed = ", ".join(f"{in_figures(value)} for {name}" for name, value in spreads.items())
        said.append(f"The heads disagree (spread) by {listed}.")
    return said
