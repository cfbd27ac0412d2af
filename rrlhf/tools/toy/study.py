"""The toy's comparison: every way to read the learned rewards, over many seeds; its table, verdict and picture."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rrlhf.progress import track
from rrlhf.robust import AGGREGATIONS, head_spread
from rrlhf.tools.reporting.plots import Look, draw_line, dress
from rrlhf.tools.reporting.tables import Table, plus_minus
from rrlhf.tools.sweeps.comparison import Interval, over_seeds
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
class Arm:
    """What became of one arm's policies."""

    gold: Interval  # expected gold reward
    gold_over_single: Interval  # paired by seed
    optimum_kl: Interval  # KL(optimum || policy), nats
    optimum_kl_over_single: Interval
    reference_kl: Interval  # KL(policy || reference), nats
    course: list[float]  # gold at the study's steps, mean over seeds


@dataclass(frozen=True)
class Study:
    """Everything that the table and the picture show."""

    setting: Setting
    steps: list[int]  # about forty, dense at the start
    optimum_gold: Interval
    reference_gold: Interval
    spread: dict[str, Interval]  # of the heads, over labelled cells and over the rest
    arms: dict[str, Arm]
    maps: dict[str, list[list[float]]]  # of the first seed: probabilities [prompts, responses] by policy


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
        optimum_gold=over_seeds(expected(worlds.gold, best)),
        reference_gold=over_seeds(expected(worlds.gold, reference)),
        spread=_spreads(worlds, learned),
        arms={
            name: Arm(
                gold=over_seeds(gold[:, i]),
                gold_over_single=over_seeds(gold[:, i] - gold[:, single]),
                optimum_kl=over_seeds(away[:, i]),
                optimum_kl_over_single=over_seeds(away[:, i] - away[:, single]),
                reference_kl=over_seeds(moved[:, i]),
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


def _spreads(worlds: Worlds, learned: Learned) -> dict[str, Interval]:
    """Return how much the heads disagree about cells that labels covered, and about the others."""
    spread = head_spread(learned.ensemble.each(lambda part: part.flatten(0, 2))).reshape(worlds.gold.shape)
    kinds = {"labelled": worlds.labelled, "not labelled": ~worlds.labelled}
    return {
        kind: over_seeds((spread * mask).sum((1, 2)) / mask.sum((1, 2))) for kind, mask in kinds.items() if mask.any()
    }


def table(study: Study) -> Table:
    """Return every arm's result for the terminal."""
    rows = [
        [
            name,
            _figures(arm.gold),
            _figures(arm.gold_over_single, "+"),
            _figures(arm.optimum_kl),
            f"{arm.reference_kl.mean:z.2f}",
        ]
        for name, arm in study.arms.items()
    ]
    header = ["", "gold", "over single head", "KL(π*‖π)", "KL(π‖ref)"]
    return Table(f"mean ± 95 % interval over {study.setting.seeds} seeds", header, rows)


def verdict(study: Study) -> list[str]:
    """Say what the numbers support, whether or not the method's claim holds."""
    learned = {name: arm.gold_over_single for name, arm in study.arms.items() if name not in {SINGLE, GOLD}}
    better = ", ".join(name for name, gain in learned.items() if gain.low > 0) or "none"
    worse = ", ".join(name for name, gain in learned.items() if gain.high < 0) or "none"
    spread = "; ".join(f"{kind} {_figures(found)}" for kind, found in study.spread.items())
    return [
        f"The exact optimum has a gold reward of {_figures(study.optimum_gold)}, the reference "
        f"{_figures(study.reference_gold)}; the policy trained on the single head reaches "
        f"{_figures(study.arms[SINGLE].gold)}.",
        f"By paired 95 % intervals of gold, better than the single head: {better}; worse: {worse}; the others cannot "
        "be told from it.",
        f"Spread of the heads over cells: {spread}. Heads that disagree no more where nothing is labelled do not know "
        "where they guess.",
    ]


def _figures(found: Interval, sign: str = "") -> str:
    """Write a mean with half the width of its 95 % interval, "1.05 ± 0.12"."""
    return plus_minus(found.mean, found.half, sign)


def figure(study: Study) -> Any:
    """Draw every arm's gold and distance to the optimum, gold on the way, and four policies of the first seed."""
    from matplotlib.figure import Figure

    drawn: Any = Figure(figsize=(11, 8), layout="constrained")
    above, below = drawn.subfigures(2, 1, height_ratios=[1.7, 1])
    gold, away, courses = above.subplots(1, 3, width_ratios=[1.2, 1, 1.1])
    for row, (name, arm) in enumerate(study.arms.items()):
        color = {SINGLE: "#D55E00", GOLD: "#009E73"}.get(name, "#0072B2" if name.startswith("robust") else "#595959")
        for axes, found in ((gold, arm.gold), (away, arm.optimum_kl)):
            axes.errorbar(found.mean, row, xerr=found.half, color=color, marker="o", capsize=3)
    gold.set_yticks(range(len(study.arms)), study.arms)
    away.set_yticks([])
    for axes in (gold, away):
        axes.set_ylim(len(study.arms) - 0.5, -0.5)
    gold.axvline(study.optimum_gold.mean, color="#009E73", linestyle="--", linewidth=1)
    gold.axvline(study.reference_gold.mean, color="#595959", linestyle=":", linewidth=1)
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
