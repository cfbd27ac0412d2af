"""The toy's comparison: every way to read the learned rewards, over many seeds; its table, verdict and picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rrlhf.judging.calibration import estimate, mean_interval
from rrlhf.progress import track
from rrlhf.robust import AGGREGATIONS, head_spread
from rrlhf.tools.reporting.plots import Bar, Look, draw_bars, draw_line, dress
from rrlhf.tools.reporting.tables import Table, plus_minus
from rrlhf.tools.toy.world import Learned, Worlds, expected, kl, learn, make_worlds, optimum, train

SINGLE = "single head"
GOLD = "gold"
# Reward of each arm: the aggregation and its settings. "single head" and "gold" (the policy that sees what no other
# does) are read elsewhere.
ARMS: dict[str, tuple[str, dict[str, float]]] = {
    **{
        f"robust {weight:g}": ("robust", {"nominal_weight": weight, "credible": 0.0})
        for weight in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
    },
    "mean": ("mean", {}),
    "UWO 0.1": ("uwo", {"uncertainty_weight": 0.1}),
    "UWO 0.5": ("uwo", {"uncertainty_weight": 0.5}),
    "entropic 1": ("entropic", {"temperature": 1.0}),
    "entropic 0.1": ("entropic", {"temperature": 0.1}),
    "constant": ("constant", {}),
}
SHOWN_MAPS = ("optimum", SINGLE, "robust 0.4", "constant")
SHOWN_COURSES = {
    SINGLE: "#D55E00",
    "robust 1": "#56B4E9",
    "robust 0.4": "#0072B2",
    "robust 0": "#000000",
    "mean": "#CC79A7",
    GOLD: "#009E73",
}


@dataclass(frozen=True)
class Setting:
    """What a study is run with."""

    seeds: int = 20
    steps: int = 1000
    beta: float = 0.2  # reward per nat of KL to the reference, in standard deviations of the labelled cells' reward
    heads: int = 5
    labelled: float = 0.5  # share of every prompt's responses that preferences compare
    interaction: float = 1.0  # how much of the reward only the prompt and the response together tell
    prompts: int = 8
    responses: int = 8


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95 % t-interval."""

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return self.high - self.mean


@dataclass(frozen=True)
class Arm:
    """What became of one arm's policies."""

    gold: Mean  # expected gold reward
    gold_over_single: Mean  # paired by seed
    optimum_kl: Mean  # KL(optimum || policy), nats
    optimum_kl_over_single: Mean
    reference_kl: Mean  # KL(policy || reference), nats
    course: list[float]  # gold at the study's steps, mean over seeds


@dataclass(frozen=True)
class Study:
    """Everything that the table and the picture show."""

    setting: Setting
    steps: list[int]  # about forty, dense at the start
    optimum_gold: Mean
    reference_gold: Mean
    spread: dict[str, Mean]  # of the heads, over labelled cells and over the rest
    arms: dict[str, Arm]
    maps: dict[str, list[list[float]]]  # of the first seed: probabilities [prompts, responses] by policy

    def content(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def study(setting: Setting) -> Study:
    """Run all seeds and arms."""
    worlds = make_worlds(setting.seeds, setting.prompts, setting.responses, setting.labelled, setting.interaction)
    learned = learn(worlds, setting.heads)
    rewards = arm_rewards(worlds, learned)
    wanted = {0, setting.steps, *(round(setting.steps ** (i / 40)) for i in range(41))}
    training = train(torch.stack(list(rewards.values()), dim=1), setting.beta, setting.steps)
    told = track(training, setting.steps + 1, "toy: policies")
    policies = {step: log_policy for step, log_policy in told if step in wanted}
    reference, final = policies[0][:, 0], policies[setting.steps]
    best = optimum(worlds.gold, reference, setting.beta)
    golds = {step: expected(worlds.gold[:, None], log_policy) for step, log_policy in policies.items()}
    gold, away, moved = golds[setting.steps], kl(best[:, None], final), kl(final, reference[:, None])
    single = list(rewards).index(SINGLE)
    return Study(
        setting=setting,
        steps=list(policies),
        optimum_gold=interval(expected(worlds.gold, best)),
        reference_gold=interval(expected(worlds.gold, reference)),
        spread=_spreads(worlds, learned),
        arms={
            name: Arm(
                gold=interval(gold[:, i]),
                gold_over_single=interval(gold[:, i] - gold[:, single]),
                optimum_kl=interval(away[:, i]),
                optimum_kl_over_single=interval(away[:, i] - away[:, single]),
                reference_kl=interval(moved[:, i]),
                course=[on_the_way[:, i].mean().item() for on_the_way in golds.values()],
            )
            for i, name in enumerate(rewards)
        },
        maps={"optimum": best[0].exp().tolist()} | {name: final[0, i].exp().tolist() for i, name in enumerate(rewards)},
    )


def arm_rewards(worlds: Worlds, learned: Learned) -> dict[str, Tensor]:
    """Return the reward [seeds, prompts, responses] that each arm's policy is trained on."""
    shape = worlds.gold.shape
    flat = learned.ensemble.each(lambda part: part.flatten(0, 2))
    read = {name: AGGREGATIONS[reward](flat, **settings).reshape(shape) for name, (reward, settings) in ARMS.items()}
    return {SINGLE: learned.single, **read, GOLD: worlds.gold}


def interval(values: Tensor) -> Mean:
    """Return the mean of values [seeds] with its 95 % t-interval."""
    found = estimate(values)
    return Mean(found.mean, *mean_interval(found))


def _spreads(worlds: Worlds, learned: Learned) -> dict[str, Mean]:
    """Return how much the heads disagree about cells that labels covered, and about the others."""
    spread = head_spread(learned.ensemble.each(lambda part: part.flatten(0, 2))).reshape(worlds.gold.shape)
    kinds = {"labelled": worlds.labelled, "not labelled": ~worlds.labelled}
    return {
        kind: interval((spread * mask).sum((1, 2)) / mask.sum((1, 2))) for kind, mask in kinds.items() if mask.any()
    }


def table(study: Study) -> Table:
    """Return every arm's result for the terminal."""
    rows = [
        [
            name,
            figures(arm.gold),
            "–" if name == SINGLE else figures(arm.gold_over_single, "+"),
            figures(arm.optimum_kl),
            f"{arm.reference_kl.mean:z.2f}",
        ]
        for name, arm in study.arms.items()
    ]
    header = ["", "gold", "over single head", "KL(π*‖π)", "KL(π‖ref)"]
    return Table(f"mean ± 95 % interval over {study.setting.seeds} seeds", header, rows)


def figures(found: Mean, sign: str = "") -> str:
    """Write a mean with half the width of its 95 % interval, "1.05 ± 0.12"."""
    return plus_minus(found.mean, found.half, sign)


def verdict(study: Study) -> list[str]:
    """Say what the numbers support, whether or not the method's claim holds."""
    robust = {name: arm for name, arm in study.arms.items() if name.startswith("robust")}
    relatives = {name: arm for name, arm in study.arms.items() if name not in {SINGLE, GOLD, *robust}}
    return [
        f"The exact optimum has a gold reward of {figures(study.optimum_gold)}, the reference "
        f"{figures(study.reference_gold)}; the policy trained on the single head reaches "
        f"{figures(study.arms[SINGLE].gold)}.",
        _compared("the robust mixtures", robust),
        _compared("the other aggregations", relatives),
        _disagreement(study.spread),
    ]


def _compared(group: str, arms: Mapping[str, Arm]) -> str:
    above = [name for name, arm in arms.items() if arm.gold_over_single.low > 0]
    below = [name for name, arm in arms.items() if arm.gold_over_single.high < 0]
    nearer = [name for name, arm in arms.items() if arm.optimum_kl_over_single.high < 0]
    best = max(arms, key=lambda name: arms[name].gold.mean)
    return (
        f"Gold of {group}, by paired 95 % intervals: better than the single head: {', '.join(above) or 'none'}; worse: "
        f"{', '.join(below) or 'none'}; the others cannot be told from it. Highest: {best}, "
        f"{figures(arms[best].gold_over_single, '+')} over the single head. "
        f"Nearer to the optimum in KL: {', '.join(nearer) or 'none'}."
    )


def _disagreement(spread: Mapping[str, Mean]) -> str:
    told = "; ".join(f"{kind} {figures(found)}" for kind, found in spread.items())
    if len(spread) < 2:
        return f"Spread of the heads over cells: {told}."
    known, unknown = spread["labelled"], spread["not labelled"]
    reading = "their disagreement does not tell where they guess"
    if unknown.low > known.high:
        reading = "they know where they guess"
    if unknown.high < known.low:
        reading = "they agree most where they guess"
    return f"Spread of the heads over cells: {told}: {reading}."


def figure(study: Study) -> Any:
    """Draw every arm's gold and distance to the optimum, gold on the way, and four policies of the first seed."""
    from matplotlib.figure import Figure

    drawn: Any = Figure(figsize=(11, 8), layout="constrained")
    above, below = drawn.subfigures(2, 1, height_ratios=[1.7, 1])
    gold, away, courses = above.subplots(1, 3, width_ratios=[1.2, 1, 1.1])
    arms = study.arms.items()
    draw_bars(gold, [Bar(name, arm.gold.mean, arm.gold.half, _look(name)) for name, arm in arms])
    gold.axvline(study.optimum_gold.mean, color="#009E73", linestyle="--", linewidth=1)
    gold.axvline(study.reference_gold.mean, color="#595959", linestyle=":", linewidth=1)
    draw_bars(away, [Bar("", arm.optimum_kl.mean, arm.optimum_kl.half, _look(name)) for name, arm in arms])
    for name, color in SHOWN_COURSES.items():
        draw_line(courses, study.steps, study.arms[name].course, Look(color, "o", ""), label=name)
    dress(gold, "expected gold reward", "")
    dress(away, "KL(optimum ‖ policy), nats", "")
    dress(courses, "steps of training", "expected gold reward")
    courses.set_xscale("symlog", linthresh=1)
    courses.set_xlim(left=0)
    courses.legend(fontsize=8, frameon=False)
    for axes, name in zip(below.subplots(1, len(SHOWN_MAPS)), SHOWN_MAPS, strict=True):
        image = axes.imshow(study.maps[name], vmin=0, vmax=1, cmap="viridis")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("response")
        axes.set_xticks([])
        axes.set_yticks([])
    below.axes[0].set_ylabel("prompt")
    below.colorbar(image, ax=below.axes, label="probability, first seed", shrink=0.8)
    return drawn


def _look(name: str) -> Look:
    others = "#0072B2" if name.startswith("robust") else "#595959"
    return Look({SINGLE: "#D55E00", GOLD: "#009E73"}.get(name, others), "o", "")
