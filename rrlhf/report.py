"""What a person reads after a run: a verdict in sentences, a table, and one HTML file that needs no network.

Nothing here is measured; every sentence is computed from the numbers of `evaluation.json` (rrlhf/evaluate.py).
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NotRequired, TypedDict

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table
from rich.text import Text

from rrlhf import plots
from rrlhf.plots import Look, Point
from rrlhf.types import Json


class Measured(TypedDict):
    """A mean with its standard error over n independent units; the error is NaN when n is 1."""

    mean: float
    stderr: float
    n: int


class Policy(TypedDict):
    """One row of the comparison; `reward` is "none" for the model that every arm starts from."""

    name: str
    nominal_weight: float | None
    reward: str
    digest: NotRequired[str]
    metrics: dict[str, Measured]


class Response(TypedDict):
    """One policy's answer to a prompt, with its scores."""

    text: str
    proxy: float
    heads: list[float]
    gold: NotRequired[float]


class Sample(TypedDict):
    """One prompt with the answer of every policy."""

    prompt: str
    responses: dict[str, Response]


class RewardModel(TypedDict):
    """How well one reward model, or one reading of the ensemble, ranks held-out pairs."""

    name: str
    accuracy: Measured
    ece: float | None


class Evaluation(TypedDict):
    """The content of evaluation.json."""

    profile: NotRequired[str]
    policies: list[Policy]
    curves: list[Point]
    samples: list[Sample]
    reward_models: list[RewardModel]


METRICS = {
    "gold": "Score by an independent judge that no policy is trained against: the nearest thing here to real quality.",
    "proxy": "Score by the single reward head, which plain PPO is trained to please. High with low gold: hacking.",
    "robust": "The reward that this arm was trained on: a mixture of the most confident and the lowest head.",
    "nominal": "Score by the most confident head of the ensemble.",
    "worst": "Score by whichever head likes the response least.",
    "mean": "Average score over the heads of the ensemble.",
    "spread": "How much the heads disagree about a response (standard deviation). High: they are guessing.",
    "kl": "How far the policy moved from its start, in nats per response. 0: not at all.",
    "words": "Words per response.",
    "repetition": "Share of words that occurred before in the same response, 0 to 1.",
    "finished": "Share of responses that came to an end instead of being cut off, 0 to 1.",
}


class Row(NamedTuple):
    """One metric of the comparison; a cell per policy."""

    metric: str
    meaning: str
    cells: list[str]
    best: int | None  # the cell to mark


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

    @property
    def over_optimised(self) -> bool:
        """Gold fell by more than chance allows while proxy kept rising (Gao et al. 2022, arXiv 2210.10760).

        The peak is the best of many updates: of flat courses of 40 updates, 22 % fall by two standard errors and
        2 % by three (simulated).
        """
        return self.fall.value > 3 * self.fall.stderr and self.end_proxy > self.peak_proxy


def render(evaluation: Evaluation, *, params: Mapping[str, Json], lineage: str, facts: Mapping[str, str]) -> str:
    """Return the report as one HTML file; everything in it that others wrote is escaped and made visible."""
    template = Environment(
        loader=PackageLoader("rrlhf", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    ).get_template("report.html.j2")
    looks = _looks(evaluation)
    return template.render(
        evaluation=evaluation,
        profile=evaluation.get("profile"),
        rewards={policy["name"]: reward_in_words(policy) for policy in evaluation["policies"]},
        verdict=verdict(evaluation),
        has_gold=bool(_measured(evaluation, "gold")),
        rows=_comparison(evaluation),
        looks=looks,
        arms=[policy["name"] for policy in evaluation["policies"] if policy["reward"] != "none"],
        progress=plots.progress_charts(evaluation["curves"], looks),
        heads=plots.head_charts(evaluation["curves"], looks),
        measured=_shown,
        facts=facts,
        lineage=lineage,
        params=yaml.safe_dump(dict(params), sort_keys=False, allow_unicode=True),
    )


def verdict(evaluation: Evaluation) -> list[str]:
    """Return 2 to 5 sentences that the numbers support.

    Differences carry sqrt(s_a^2 + s_b^2) and count as noise below two of those. Policies answer the same prompts, so
    this errs on the careful side where their scores go together.
    """
    golds = _measured(evaluation, "gold")
    if not golds:
        return _verdict_without_gold(evaluation)
    return [*_ends(evaluation, golds, "gold"), *_over_optimisation(evaluation)]


def table(evaluation: Evaluation) -> Table:
    """Return the comparison for the terminal: mean ± standard error, the best gold in bold."""
    shown = Table(title="mean ± standard error over prompts", title_justify="left")
    shown.add_column("", no_wrap=True)
    for policy in evaluation["policies"]:
        shown.add_column(Text(f"{visible(policy['name'])}\n{visible(reward_in_words(policy))}"), justify="right")
    for row in _comparison(evaluation):
        cells = [Text(cell, style="bold" if i == row.best else "") for i, cell in enumerate(row.cells)]
        shown.add_row(Text(visible(row.metric)), *cells)
    return shown


def reward_in_words(policy: Policy) -> str:
    """Say which reward trained a policy; a mixture names both weights."""
    weight = policy["nominal_weight"]
    if weight is not None:
        return f"{weight:g} most confident + {1 - weight:g} minimum"
    return {"none": "the start", "single": "one reward head"}.get(policy["reward"], policy["reward"])


def visible(text: str) -> str:
    """Show control and other unseen characters as ⟨U+001B⟩, so that no text acts on a terminal or hides in a page."""
    return "".join(character if character in "\n\t" else _seen(character) for character in text)


def _seen(character: str) -> str:
    hidden = unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return f"⟨U+{ord(character):04X}⟩" if hidden else character


def _looks(evaluation: Evaluation) -> dict[str, Look]:
    """Give every policy that is named anywhere its colour and shape; the start is grey."""
    start = [policy["name"] for policy in evaluation["policies"] if policy["reward"] == "none"]
    names = [policy["name"] for policy in evaluation["policies"]]
    names += [point["policy"] for point in evaluation["curves"]]
    names += [name for sample in evaluation["samples"] for name in sample["responses"]]
    arms = [name for name in dict.fromkeys(names) if name not in start]
    return dict.fromkeys(start, plots.REFERENCE_LOOK) | plots.arm_looks(arms)


def _measured(evaluation: Evaluation, metric: str) -> dict[str, Measured]:
    """Return what is known of a metric, by policy."""
    found = {policy["name"]: policy["metrics"].get(metric) for policy in evaluation["policies"]}
    return {name: value for name, value in found.items() if value and math.isfinite(value["mean"])}


def _comparison(evaluation: Evaluation) -> list[Row]:
    """Return a row for every metric that some policy has: first the known ones in order, then any others."""
    present = [metric for policy in evaluation["policies"] for metric in policy["metrics"]]
    names = [policy["name"] for policy in evaluation["policies"]]
    rows = []
    for metric in dict.fromkeys([*(metric for metric in METRICS if metric in present), *present]):
        known = _measured(evaluation, metric)
        cells = [_shown(known[name]) if name in known else "–" for name in names]
        best = names.index(_highest(known)) if metric == "gold" and known else None
        if best is not None:
            cells[best] = f"★ {cells[best]}"
        rows.append(Row(metric, METRICS.get(metric, ""), cells, best))
    return rows


def _shown(value: Measured) -> str:
    error = "" if math.isnan(value["stderr"]) else f" ± {value['stderr']:.2f}"
    return f"{value['mean']:z.2f}{error}"


def _highest(known: Mapping[str, Measured]) -> str:
    return max(known, key=lambda name: known[name]["mean"])


def _difference(a: Measured, b: Measured) -> Difference:
    return Difference(a["mean"] - b["mean"], math.hypot(a["stderr"], b["stderr"]))


def _ends(evaluation: Evaluation, known: Mapping[str, Measured], metric: str) -> list[str]:
    """Say which trained arm ends highest, and which comes next, relative to the start and to each other."""
    start = next((p["name"] for p in evaluation["policies"] if p["reward"] == "none" and p["name"] in known), None)
    ranked = sorted((name for name in known if name != start), key=lambda name: -known[name]["mean"])
    if not ranked:
        return [
            "There is no trained arm to compare.",
            *(f"{name} has {metric} {_shown(known[name])}." for name in known),
        ]
    best, *others = ranked
    highest = f"the highest {metric} of the {len(ranked)} arms: " if others else f"{metric} "
    relative = f", which is {_against(known, best, start)} ({_shown(known[start])})" if start else ""
    said = [f"{best} ends with {highest}{_shown(known[best])}{relative}."]
    if others:
        second = others[0]
        gaps = [_against(known, second, name) for name in (best, start) if name]
        said.append(f"{second} comes next with {_shown(known[second])}: {', '.join(gaps)}.")
    return said


def _against(known: Mapping[str, Measured], name: str, other: str) -> str:
    return _difference(known[name], known[other]).against(other)


def _over_optimisation(evaluation: Evaluation) -> list[str]:
    """Say for which arms gold fell from its own peak while proxy kept rising: at most one sentence for each answer."""
    courses = {
        name: _course(golden)
        for name, points in plots.courses(evaluation["curves"]).items()
        if len(golden := plots.having(plots.having(points, "gold"), "proxy")) > plots.NEIGHBOURS
    }
    if not courses:
        trained = any(policy["reward"] != "none" for policy in evaluation["policies"])
        return ["There are too few updates with gold to say whether over-optimisation set in."] if trained else []
    showed = [f"for {name}: {_told(course)}" for name, course in courses.items() if course.over_optimised]
    spared = [f"for {name}: {_told(course)}" for name, course in courses.items() if not course.over_optimised]
    said = [f"Over-optimisation showed {'; '.join(showed)}."] if showed else []
    return said + ([f"Over-optimisation did not show {'; '.join(spared)}."] if spared else [])


def _course(points: Sequence[Point]) -> Course:
    """Read gold's peak and end.

    The peak is the best of many windows: 40 updates of flat gold fall by more than two errors one time in five.
    """
    golds = plots.neighbour_means([point["gold"] for point in points])
    stderrs = plots.neighbour_stderrs([point.get("gold_stderr", math.nan) for point in points])
    proxies = plots.neighbour_means([point["proxy"] for point in points])
    updates = plots.neighbour_means([point["update"] for point in points])
    peak = golds.index(max(golds))
    return Course(
        peak_update=round(updates[peak]),
        peak_gold=golds[peak],
        end_gold=golds[-1],
        fall=Difference(golds[peak] - golds[-1], math.hypot(stderrs[peak], stderrs[-1])),
        peak_proxy=proxies[peak],
        end_proxy=proxies[-1],
    )


def _told(course: Course) -> str:
    peak = f"gold peaked at {course.peak_gold:z.2f} around update {course.peak_update}"
    proxy = f"proxy went from {course.peak_proxy:z.2f} to {course.end_proxy:z.2f}"
    if course.fall.value == 0:
        return f"{peak}, where training ended"
    noise = ", within noise" if course.fall.is_noise else ""
    error = "" if math.isnan(course.fall.stderr) else f" ± {course.fall.stderr:.2f}"
    return f"{peak} and ended at {course.end_gold:z.2f} (a fall of {course.fall.value:.2f}{error}{noise}) while {proxy}"


def _verdict_without_gold(evaluation: Evaluation) -> list[str]:
    said = [
        "No gold judge read this run: the numbers say what the reward models think of the responses, not whether the "
        "responses became better."
    ]
    proxies, spreads = _measured(evaluation, "proxy"), _measured(evaluation, "spread")
    if proxies:
        said += _ends(evaluation, proxies, "proxy")
    if spreads:
        listed = ", ".join(f"{_shown(value)} for {name}" for name, value in spreads.items())
        said.append(f"The heads disagree (spread) by {listed}.")
    return said
