"""Why rrlhf exists: rewards that stay honest when a policy leaves the data its reward models were trained on.

Reward-Robust RLHF (Yan et al. 2024, arXiv 2409.15360): optimise a mixture of the reward that the ensemble is most
sure of and the worst reward that any member gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """What a reward ensemble believes about a batch: one Gaussian per response and head, in normalised units."""

    mean: Tensor  # [batch, heads]
    std: Tensor  # [batch, heads]


def certain(scores: Scores) -> Scores:
    """Return the means with standard deviations of 0."""
    return Scores(scores.mean, torch.zeros_like(scores.std))


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


def median_reward(scores: Scores) -> Tensor:
    """Return the median [batch] of the heads' means; of an even number of heads, the middle of the two inner ones."""
    return scores.mean.quantile(0.5, dim=1)


def robust_reward(scores: Scores, nominal_weight: float) -> Tensor:
    """Return nominal_weight * nominal + (1 - nominal_weight) * worst, [batch] (arXiv 2409.15360, eq. 7, per sample).

    The weight is the paper's lambda: 1 is the nominal reward alone, 0 the worst case alone.
    """
    return torch.lerp(worst_reward(scores), nominal_reward(scores), nominal_weight)


def batch_robust_reward(scores: Scores, nominal_weight: float) -> Tensor:
    """Like `robust_reward`, with the one head whose mean over the batch is least in place of each response's lowest.

    Its average over the batch is eq. 7 to the letter: E[min_i r_i] <= min_i E[r_i], so this one is the kinder.
    """
    worst = scores.mean[:, scores.mean.mean(dim=0).argmin()]
    return torch.lerp(worst, nominal_reward(scores), nominal_weight)


def uwo_reward(scores: Scores, uncertainty_weight: float) -> Tensor:
    """Return mean_i mu_i - uncertainty_weight * var_i mu_i, [batch].

    Uncertainty-weighted optimisation (Coste et al. 2023, arXiv 2310.02743, eq. 4); 0.1 there for PPO.
    """
    return mean_reward(scores) - uncertainty_weight * scores.mean.var(dim=1, correction=0)


def mean_minus_std_reward(scores: Scores, uncertainty_weight: float) -> Tensor:
    """Return mean_i mu_i - uncertainty_weight * std_i mu_i, [batch] (Eisenstein et al. 2023, arXiv 2312.09244)."""
    return mean_reward(scores) - uncertainty_weight * head_spread(scores)


def lower_bound_reward(scores: Scores, uncertainty_weight: float) -> Tensor:
    """Return min_i (mu_i - uncertainty_weight * sigma_i), [batch]: the least lower confidence bound of any head."""
    return (scores.mean - uncertainty_weight * scores.std).amin(dim=1)


def entropic_reward(scores: Scores, temperature: float) -> Tensor:
    """Return -b log mean_i exp(-mu_i / b) with b = temperature, [batch].

    The entropic risk measure (Follmer and Schied 2002): the mean of the heads as b grows, their minimum as b falls
    to 0.
    """
    heads = scores.mean.shape[1]
    return -temperature * (torch.logsumexp(-scores.mean / temperature, dim=1) - math.log(heads))


def gaussian_entropic_reward(scores: Scores, temperature: float) -> Tensor:
    """Return the entropic risk of the heads' Gaussians, [batch]: a head counts as mu_i - sigma_i^2 / (2 b).

    That is -b log E exp(-r / b) for r ~ N(mu_i, sigma_i^2), in closed form.
    """
    certain = scores.mean - scores.std**2 / (2 * temperature)
    return entropic_reward(Scores(certain, scores.std), temperature)


def constant_reward(scores: Scores) -> Tensor:
    """Return 0 for every response, [batch]: with a KL penalty, the policy that is safe because it learns nothing."""
    return torch.zeros_like(scores.mean[:, 0])


# The ways to read an ensemble that need no setting; every one is judged on held-out pairs.
READINGS: dict[str, Callable[[Scores], Tensor]] = {
    "mean": mean_reward,
    "nominal": nominal_reward,
    "worst": worst_reward,
}

# Every reward that an arm may name, besides "single", which reads no ensemble. The arguments after the scores are the
# arm's settings of the same names.
AGGREGATIONS: dict[str, Callable[..., Tensor]] = {
    **READINGS,
    "batch_robust": batch_robust_reward,
    "constant": constant_reward,
    "entropic": entropic_reward,
    "gaussian_entropic": gaussian_entropic_reward,
    "lower_bound": lower_bound_reward,
    "mean_minus_std": mean_minus_std_reward,
    "median": median_reward,
    "robust": robust_reward,
    "uwo": uwo_reward,
}


def head_spread(scores: Scores) -> Tensor:
    """Return the standard deviation [batch] of the heads' means around their average: how much the heads disagree."""
    return scores.mean.std(dim=1, correction=0)
