"""Why rrlhf exists: rewards that stay honest when a policy leaves the data its reward models were trained on.

Reward-Robust RLHF (Yan et al. 2024, arXiv 2409.15360): optimise a mixture of the reward that the ensemble is most
sure of and the worst reward that any member gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """What a reward ensemble believes about a batch: one Gaussian per response and head, in normalised units."""

    mean: Tensor  # [batch, heads]
    std: Tensor  # [batch, heads]


def most_confident(scores: Scores) -> Tensor:
    """Return the index [batch] of the head with the least standard deviation, i* = argmin_i sigma_i."""
    return scores.std.argmin(dim=1)


def nominal_reward(scores: Scores) -> Tensor:
    """Return the mean [batch] of the most confident head, mu_{i*} (arXiv 2409.15360, section 4)."""
    return scores.mean.gather(1, most_confident(scores)[:, None]).squeeze(1)


def worst_reward(scores: Scores) -> Tensor:
    """Return the least mean [batch] over heads, min_i mu_i."""
    return scores.mean.amin(dim=1)


def mean_reward(scores: Scores) -> Tensor:
    """Return the average [batch] of the heads' means."""
    return scores.mean.mean(dim=1)


# The ways to read an ensemble that need no setting; every one is judged on held-out pairs.
READINGS: dict[str, Callable[[Scores], Tensor]] = {
    "mean": mean_reward,
    "nominal": nominal_reward,
    "worst": worst_reward,
}


def robust_reward(scores: Scores, nominal_weight: float) -> Tensor:
    """Return nominal_weight * nominal + (1 - nominal_weight) * worst, [batch] (arXiv 2409.15360, eq. 7, per sample).

    The weight is the paper's lambda: 1 is the nominal reward alone, 0 the worst case alone.
    """
    return torch.lerp(worst_reward(scores), nominal_reward(scores), nominal_weight)


def head_spread(scores: Scores) -> Tensor:
    """Return the standard deviation [batch] of the heads' means around their average: how much the heads disagree."""
    return scores.mean.std(dim=1, correction=0)
