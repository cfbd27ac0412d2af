"""The toy's comparison: every way to read the learned rewards, over many seeds."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from scipy import stats
from torch import Tensor

from rrlhf.progress import track
from rrlhf.robust import AGGREGATIONS, head_spread
from rrlhf.tools.toy.policy import train
from rrlhf.tools.toy.problem import Worlds, expected, kl, make_worlds, optimum
from rrlhf.tools.toy.rewards import EPOCHS, Learned, learn

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


class Setting(NamedTuple):
    """What a study is run with."""

    seeds: int = 20
    steps: int = 1000
    beta: float = 0.2  # reward per nat of KL to the reference, in standard deviations of the labelled cells' reward
    heads: int = 5
    labelled: float = 0.5  # share of every prompt's responses that preferences compare
    interaction: float = 1.0  # how much of the reward only the prompt and the response together tell
    prompts: int = 8
    responses: int = 8


class Interval(TypedDict):
    """A mean over seeds with its 95 % t-interval."""

    mean: float
    low: float
    high: float


class Arm(TypedDict):
    """What became of one arm's policies."""

    name: str
    gold: Interval  # expected gold reward
    gold_over_single: Interval  # paired by seed
    optimum_kl: Interval  # KL(optimum || policy), nats
    optimum_kl_over_single: Interval
    reference_kl: Interval  # KL(policy || reference), nats
    own_gap: Interval  # what the policy leaves of the best value of its own objective


class Course(TypedDict):
    """Gold on the way, mean over seeds."""

    name: str
    steps: list[int]
    gold: list[float]


class Study(TypedDict):
    """Everything that the table and the picture show."""

    setting: dict[str, float]
    optimum_gold: Interval
    reference_gold: Interval
    accuracy: dict[str, Interval]  # pairs of cells ranked right: by reward, "seen" labels and "unseen" ones
    spread: dict[str, Interval]  # of the heads, over labelled cells and over the rest
    arms: list[Arm]
    courses: list[Course]
    maps: dict[str, list[list[float]]]  # of the first seed: probabilities [prompts, responses] by policy


def study(setting: Setting) -> Study:
    """Run all seeds and arms."""
    worlds = make_worlds(setting.seeds, setting.prompts, setting.responses, setting.labelled, setting.interaction)
    learned: list[Learned] = []
    for _ in track(learn(worlds, setting.heads, learned), EPOCHS, "toy: reward models"):
        pass
    rewards = arm_rewards(worlds, learned[0])
    names = list(rewards)
    wanted = _checkpoints(setting.steps)
    stacked = torch.stack(list(rewards.values()), dim=1)
    training = track(train(stacked, setting.beta, setting.steps), setting.steps + 1, "toy: policies")
    kept = {step: log_policy for step, log_policy in training if step in wanted}
    return _summary(setting, worlds, learned[0], names, stacked, kept)


def arm_rewards(worlds: Worlds, learned: Learned) -> dict[str, Tensor]:
    """Return the reward [seeds, prompts, responses] that each arm's policy is trained on."""
    shape = worlds.gold.shape
    flat = learned.ensemble.each(lambda part: part.flatten(0, 2))
    read = {name: AGGREGATIONS[reward](flat, **settings).reshape(shape) for name, (reward, settings) in ARMS.items()}
    return {SINGLE: learned.single, **read, GOLD: worlds.gold}


def interval(values: Tensor) -> Interval:
    """Return the mean of values [seeds] with its 95 % t-interval."""
    mean, n = values.double().mean().item(), len(values)
    half = float(stats.t.ppf(0.975, n - 1)) * values.double().std().item() / n**0.5 if n > 1 else float("nan")
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _checkpoints(steps: int) -> set[int]:
    """Return about forty step numbers, dense at the start."""
    return {0, steps, *(round(steps ** (i / 40)) for i in range(41))}


def _summary(
    setting: Setting, worlds: Worlds, learned: Learned, names: list[str], rewards: Tensor, kept: dict[int, Tensor]
) -> Study:
    reference, final = kept[0][:, 0], kept[setting.steps]
    best = optimum(worlds.gold, reference, setting.beta)
    gold = expected(worlds.gold[:, None], final)  # [seeds, arms]
    away = kl(best[:, None], final)
    moved = kl(final, reference[:, None])
    own_best = optimum(rewards, reference[:, None], setting.beta)
    own_gap = (expected(rewards, own_best) - setting.beta * kl(own_best, reference[:, None])) - (
        expected(rewards, final) - setting.beta * moved
    )
    single = names.index(SINGLE)
    steps = sorted(kept)
    by_step = torch.stack([expected(worlds.gold[:, None], kept[step]).mean(0) for step in steps])
    shown = {"reference": reference, "optimum": best} | {name: final[:, names.index(name)] for name in names}
    return {
        "setting": dict(setting._asdict()),
        "optimum_gold": interval(expected(worlds.gold, best)),
        "reference_gold": interval(expected(worlds.gold, reference)),
        "accuracy": _accuracies(worlds, learned),
        "spread": _spreads(worlds, learned),
        "arms": [
            {
                "name": name,
                "gold": interval(gold[:, i]),
                "gold_over_single": interval(gold[:, i] - gold[:, single]),
                "optimum_kl": interval(away[:, i]),
                "optimum_kl_over_single": interval(away[:, i] - away[:, single]),
                "reference_kl": interval(moved[:, i]),
                "own_gap": interval(own_gap[:, i]),
            }
            for i, name in enumerate(names)
        ],
        "courses": [{"name": name, "steps": steps, "gold": by_step[:, i].tolist()} for i, name in enumerate(names)],
        "maps": {name: log_policy[0].exp().tolist() for name, log_policy in shown.items()},
    }


def _accuracies(worlds: Worlds, learned: Learned) -> dict[str, Interval]:
    """Return the share of pairs of a prompt's responses that a reward ranks as gold does."""
    known = worlds.labelled[..., :, None] & worlds.labelled[..., None, :]
    truth = worlds.gold[..., :, None] > worlds.gold[..., None, :]
    found: dict[str, Interval] = {}
    for name, reward in (("single head", learned.single), ("mean of the heads", learned.ensemble.mean.mean(-1))):
        right = ((reward[..., :, None] > reward[..., None, :]) == truth).float()
        for kind, pairs in (("seen", known), ("unseen", ~known & truth.logical_or(truth.transpose(-1, -2)))):
            if pairs.any():
                found[f"{name}, {kind}"] = interval((right * pairs).sum((1, 2, 3)) / pairs.sum((1, 2, 3)))
    return found


def _spreads(worlds: Worlds, learned: Learned) -> dict[str, Interval]:
    """Return how much the heads disagree about cells that labels covered, and about the others."""
    shape = worlds.gold.shape
    spread = head_spread(learned.ensemble.each(lambda part: part.flatten(0, 2))).reshape(shape)
    kinds = {"labelled": worlds.labelled, "not labelled": ~worlds.labelled}
    return {
        kind: interval((spread * mask).sum((1, 2)) / mask.sum((1, 2))) for kind, mask in kinds.items() if mask.any()
    }
