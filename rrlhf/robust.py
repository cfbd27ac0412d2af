"""Why rrlhf exists: rewards that stay honest when a policy leaves the data its reward models were trained on.

Reward-Robust RLHF (Yan et al. 2024, arXiv 2409.15360): optimise a mixture of the reward that the ensemble is most
sure of and the worst reward that it holds for possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # config.py reads here which settings a reward takes, and whoever reads settings loads no torch
    from torch import Tensor


class Scores(NamedTuple):
    """What a reward ensemble believes about a batch: one Gaussian per response and head, in normalised units."""

    mean: Tensor  # [batch, heads]
    std: Tensor  # [batch, heads]
    # [batch, spaces, inner]: what the standard deviations are the lengths of, where they are those of a posterior. The
    # covariance of two rewards is the product of these (rewards/posterior.py).
    offset: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Scores:
        """Return the scores with every part changed in the same way."""
        return Scores(change(self.mean), change(self.std), None if self.offset is None else change(self.offset))

    def of(self, rows: Sequence[int]) -> Scores:
        """Return the scores of some responses of the batch."""
        return self.each(lambda part: part[rows])


def certain(scores: Scores) -> Scores:
    """Return the means with standard deviations of 0."""
    return Scores(scores.mean, scores.std.new_zeros(scores.std.shape))


def difference_std(one: Scores, other: Scores) -> Tensor:
    """Return the standard deviation [batch, heads] of each head's reward of `one` less that of `other`.

    Rewards of a posterior go together; without one they are taken for independent.
    """
    if one.offset is None or other.offset is None:
        return one.std.hypot(other.std)
    length: Tensor = (one.offset - other.offset).norm(dim=2)
    return length.expand_as(one.std)


def most_confident(scores: Scores) -> Tensor:
    """Return each head's share [batch, heads] in the choice i* = argmin_i sigma_i; heads that tie have equal shares.

    Heads on one trunk tie always, when their standard deviations are those of one posterior.
    """
    least = (scores.std == scores.std.amin(dim=1, keepdim=True)).to(scores.mean)
    return least / least.sum(dim=1, keepdim=True)


def nominal_reward(scores: Scores) -> Tensor:
    """Return the mean [batch] of the most confident head, mu_{i*} (arXiv 2409.15360, section 4); of ties the mean."""
    return (scores.mean * most_confident(scores)).sum(dim=1)


def worst_reward(scores: Scores, credible: float = 0.0) -> Tensor:
    """Return the least reward [batch] in the heads' credible sets, min_i (mu_i - credible * sigma_i).

    credible: how far the set {r : |r - mu_i| <= credible * sigma_i} reaches, in standard deviations; 0 leaves the least
    mean of any head, the worst case of arXiv 2409.15360.
    """
    return (scores.mean - credible * scores.std).amin(dim=1)


def mean_reward(scores: Scores) -> Tensor:
    """Return the average [batch] of the heads' means."""
    return scores.mean.mean(dim=1)


def median_reward(scores: Scores) -> Tensor:
    """Return the median [batch] of the heads' means; of an even number of heads, the middle of the two inner ones."""
    return scores.mean.quantile(0.5, dim=1)


def robust_reward(scores: Scores, nominal_weight: float, credible: float) -> Tensor:
    """Return nominal_weight * nominal + (1 - nominal_weight) * worst, [batch] (arXiv 2409.15360, eq. 7, per sample).

    The weight is the paper's lambda: 1 is the nominal reward alone, 0 the worst case alone. Of one head it is
    mu - (1 - nominal_weight) * credible * sigma.
    """
    return worst_reward(scores, credible).lerp(nominal_reward(scores), nominal_weight)


def batch_robust_reward(scores: Scores, nominal_weight: float, credible: float) -> Tensor:
    """Like `robust_reward`, with the one head that is lowest on average over the batch in place of each response's.

    Its average over the batch is eq. 7 to the letter: E[min_i r_i] <= min_i E[r_i], so this one is the kinder.
    """
    low = scores.mean - credible * scores.std
    lowest: Tensor = low[:, low.mean(dim=0).argmin()]
    return lowest.lerp(nominal_reward(scores), nominal_weight)


def ellipsoid_reward(scores: Scores, credible: float) -> Tensor:
    """Return the reward [batch] of the weights that are worst for the batch as a whole, least over heads.

    The weights lie in the ellipsoid |L' (theta - mode)| <= credible, H = L L', and make the mean reward of the batch
    over that of the reference responses least (Zhang et al. 2024, arXiv 2403.05171, eq. 5): with z = L^-1 (x - x_ref),
    mu - credible * z . z_mean / |z_mean|. Less pessimistic than `worst`: what is unsure in other directions than the
    batch's costs nothing. Raises ValueError for scores without a posterior.
    """
    if scores.offset is None:
        raise ValueError("reward ellipsoid needs ensemble.sigma posterior")
    centre = scores.offset.mean(dim=0)  # [spaces, inner]
    towards = centre / centre.norm(dim=1, keepdim=True).clamp_min(1e-12)
    along: Tensor = (scores.offset * towards).sum(dim=2)  # [batch, spaces]
    return (scores.mean - credible * along).amin(dim=1)


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
    return worst_reward(scores, uncertainty_weight)


def entropic_reward(scores: Scores, temperature: float) -> Tensor:
    """Return -b log mean_i exp(-mu_i / b) with b = temperature, [batch].

    The entropic risk measure (Follmer and Schied 2002): the mean of the heads as b grows, their minimum as b falls
    to 0.
    """
    heads = scores.mean.shape[1]
    return -temperature * ((-scores.mean / temperature).logsumexp(dim=1) - math.log(heads))


def gaussian_entropic_reward(scores: Scores, temperature: float) -> Tensor:
    """Return the entropic risk of the heads' Gaussians, [batch]: a head counts as mu_i - sigma_i^2 / (2 b).

    That is -b log E exp(-r / b) for r ~ N(mu_i, sigma_i^2), in closed form.
    """
    certain = scores.mean - scores.std**2 / (2 * temperature)
    return entropic_reward(Scores(certain, scores.std), temperature)


def constant_reward(scores: Scores) -> Tensor:
    """Return 0 for every response, [batch]: with a KL penalty, the policy that is safe because it learns nothing."""
    return scores.mean.new_zeros(len(scores.mean))


# The ways to read an ensemble that need no setting; every one is judged on held-out pairs.
READINGS: dict[str, Callable[[Scores], Tensor]] = {
    "mean": mean_reward,
    "nominal": nominal_reward,
    "worst": worst_reward,
}

# Every reward that an arm may name, besides "single", which reads no ensemble. The arguments after the scores are the
# arm's settings of the same names (rrlhf/config.py).
AGGREGATIONS: dict[str, Callable[..., Tensor]] = {
    **READINGS,
    "batch_robust": batch_robust_reward,
    "constant": constant_reward,
    "ellipsoid": ellipsoid_reward,
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
