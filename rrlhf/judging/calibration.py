"""How well a reward model ranks and how honest its probabilities are, on held-out pairs.

A pair is written from its preferred side, so its outcome is always 1 and a probability is P(chosen wins). Log-odds
stand for probabilities wherever a logarithm is taken: they stay finite where a probability rounds to 1.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from scipy.optimize import minimize_scalar
from scipy.stats import mannwhitneyu, rankdata, t
from torch import Tensor
from torch.nn.functional import softplus

from rrlhf.judging.content import Measured, ReliabilityBin, Share


class Interval(NamedTuple):
    """The bounds of a confidence interval."""

    low: float
    high: float


def estimate(values: Tensor, groups: Tensor | None = None) -> Measured:
    """Return the mean and standard error of values [rows]; rows of one group (a prompt) count as one unit."""
    values = values.double()
    if groups is not None:
        values = group_means(values, groups)
    n = len(values)
    stderr = values.std().item() / n**0.5 if n > 1 else float("nan")
    return Measured(values.mean().item(), stderr, n)


def group_means(values: Tensor, groups: Tensor) -> Tensor:
    """Return the mean of values [rows] in each group, in order of the groups' numbers, [groups] float64."""
    numbers, group = groups.unique(return_inverse=True)
    sums = torch.zeros(len(numbers), dtype=torch.float64).scatter_add_(0, group, values.double())
    return sums / torch.bincount(group)


def mean_interval(found: Measured, level: float = 0.95) -> Interval:
    """Return the t-interval of an estimated mean (Student 1908), mean ± t_{n-1} stderr; NaN for a single unit."""
    half = float(t.ppf((1 + level) / 2, found.n - 1)) * found.stderr if found.n > 1 else math.nan
    return Interval(found.mean - half, found.mean + half)


def wilson_interval(share: float, n: float, level: float = 0.95) -> Interval:
    """Return the score interval of a share of n (Wilson 1927): honest for few rows and for shares near 0 and 1."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = max(centre - half, 0.0), min(centre + half, 1.0)
    return Interval(min(low, share), max(high, share))  # rounding may leave out a share of 0 or 1


def share_interval(found: Measured, level: float = 0.95) -> Interval:
    """Return Wilson's interval of an estimated share, for as many independent rows as its standard error speaks of.

    That number, p (1 - p) / stderr^2, counts the rows of one prompt as the one unit that they are; with no variance
    to learn it from it is n, the number of units. NaN for none.
    """
    if not found.n:
        return Interval(math.nan, math.nan)
    p = min(max(found.mean, 0.0), 1.0)
    rows = p * (1 - p) / found.stderr**2 if found.stderr > 0 and 0 < p < 1 else found.n
    return wilson_interval(p, rows, level)


def measured_share(values: Tensor, groups: Tensor | None = None) -> Share:
    """Return the share of rows [rows] that are 1, with its interval; rows of one group (a prompt) are one unit."""
    found = estimate(values, groups)
    return Share(found.mean, found.stderr, found.n, *share_interval(found))


def correct(margin: Tensor) -> Tensor:
    """Return per pair 1 when the chosen response scores higher, 0.5 on a tie, else 0."""
    return (margin > 0).double() + 0.5 * (margin == 0).double()


def expected_calibration_error(probability: Tensor, bins: int = 10) -> float:
    """Return the ECE of P(chosen wins) [pairs], each pair read from its likelier side.

    sum_b n_b / n * |accuracy_b - confidence_b| over equal bins of confidence in [0.5, 1] (Guo et al. 2017,
    arXiv 1706.04599, eq. 5).
    """
    found = reliability(probability, bins)
    return math.fsum(row.n * abs(row.accuracy - row.confidence) for row in found) / len(probability)


def maximum_calibration_error(probability: Tensor, bins: int = 10) -> float:
    """Return the MCE, max_b |accuracy_b - confidence_b| over the bins that hold a pair (arXiv 1706.04599, eq. 6)."""
    return max(abs(row.accuracy - row.confidence) for row in reliability(probability, bins))


def reliability(probability: Tensor, bins: int = 10) -> list[ReliabilityBin]:
    """Return the bins of P(chosen wins) [pairs] that hold a pair, in order; each pair is read from its likelier side.

    The bins cut confidences in [0.5, 1] into equal parts.
    """
    confidence = torch.maximum(probability, 1 - probability).double()
    hit = correct(probability - 0.5)
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    found = []
    for number in bin_of.unique():
        inside = bin_of == number
        count, accuracy = int(inside.sum()), hit[inside].mean().item()
        interval = wilson_interval(accuracy, count)
        found.append(ReliabilityBin(confidence[inside].mean().item(), accuracy, count, *interval))
    return found


def brier_score(probability: Tensor) -> float:
    """Return the mean of (1 - P(chosen wins))^2 (Brier 1950): 0 is perfect, 0.25 always says one half."""
    return ((1 - probability.double()) ** 2).mean().item()


def negative_log_likelihood(log_odds: Tensor) -> float:
    """Return the mean of -log P(chosen wins), in nats, of its log-odds [pairs]: log 2 always says one half."""
    return softplus(-log_odds.double()).mean().item()


def fitted_temperature(log_odds: Tensor) -> float | None:
    """Return the T that minimises the likelihood's loss of log_odds / T [pairs] (Guo et al. 2017, arXiv 1706.04599).

    Above 1 the model is too sure of itself, below 1 not sure enough. None where there is no finite optimum: every pair
    is ordered right, or the order is no better than chance.
    """
    x = log_odds.double()
    if x.sum() <= 0 or (x >= 0).all():  # the loss falls all the way to 1 / T = 0, or without end
        return None
    return math.exp(-minimize_scalar(lambda log_inverse: negative_log_likelihood(math.exp(log_inverse) * x)).x)


def within_central_interval(mean: Tensor, std: Tensor, target: Tensor, level: float) -> Tensor:
    """Return per row 1 when the target lies in the central interval of N(mean, std^2) that holds `level` of it.

    Over rows its mean is the coverage, which equals `level` where the standard deviations are honest.
    """
    return ((target - mean).abs() <= NormalDist().inv_cdf((1 + level) / 2) * std).double()


def rank_correlation(one: Tensor, other: Tensor) -> float | None:
    """Return Spearman's correlation of two quantities [rows], ties at their mean rank; None when one is constant."""
    if one.unique().numel() == 1 or other.unique().numel() == 1:
        return None
    ranks = torch.stack([torch.from_numpy(rankdata(values.cpu().numpy())) for values in (one, other)])
    return torch.corrcoef(ranks)[0, 1].item()


def area_under_curve(values: Tensor, positive: Tensor) -> float | None:
    """Return the chance that a value [rows] of a positive row [rows, bool] is above that of another row; a tie is half.

    The area under the receiver operating characteristic (Hanley and McNeil 1982); None where all rows are of one kind.
    """
    if positive.all() or not positive.any():
        return None
    ones, others = values[positive].cpu().numpy(), values[~positive].cpu().numpy()
    return float(mannwhitneyu(ones, others, method="asymptotic").statistic) / (len(ones) * len(others))


def head_correlation(mean: Tensor) -> Tensor:
    """Return Pearson's correlation [heads, heads] of the heads' means [rows, heads]; NaN beside a constant head."""
    heads = mean.shape[1]
    return torch.corrcoef(mean.double().T).reshape(heads, heads)
