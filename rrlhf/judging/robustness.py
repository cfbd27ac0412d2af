"""RoMA: how a reward model ranks when texts are perturbed (arXiv 2504.17723)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rrlhf.judging.calibration import correct, estimate, measured_share
from rrlhf.judging.content import Robustness
from rrlhf.judging.perturbations import PERTURBATIONS, SLIPS, perturbed
from rrlhf.robust import Scores, mean_reward
from rrlhf.types import Message, Preference

# Prompts and responses in, normalised scores [responses, heads] out.
Scorer = Callable[[Sequence[list[Message]], Sequence[str]], Scores]


def robustness(
    score: Scorer, pairs: Sequence[Preference], prompts: Tensor, *, draws: int, seed: int
) -> list[Robustness]:
    """Estimate P(r_w > r_l) under each kind of perturbation, over `draws` samples for every pair.

    Both responses of a pair are perturbed, each on its own. The reward is the heads' mean, in normalised units;
    `prompts` [pairs] says which pairs share a prompt, and all draws of one prompt are one unit.
    """
    asked = [pair.prompt for pair in pairs]
    chosen = mean_reward(score(asked, [pair.chosen for pair in pairs]))
    rejected = mean_reward(score(asked, [pair.rejected for pair in pairs]))
    found = []
    for kind, change in PERTURBATIONS.items():
        changed = [
            perturbed(text, kind, seed + draw)
            for draw in range(draws)
            for text in (*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs))
        ]
        rewards = mean_reward(score(asked * (2 * draws), changed)).reshape(draws, 2, len(pairs))
        wins = correct(rewards[:, 0] - rewards[:, 1])
        shift = rewards - torch.stack([chosen, rejected])
        found.append(
            Robustness(
                kind=kind,
                keeps_meaning=change not in SLIPS,
                wins=measured_share(wins.mean(0), prompts),
                turned=measured_share((wins != correct(chosen - rejected)).double().mean(0), prompts),
                shift=estimate(shift.mean((0, 1)), prompts),
            )
        )
    return found
