"""Every loss, one function each. Means over tokens are masked means; pairs are [batch] or [batch, heads]."""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rrlhf.kl import k3
from rrlhf.returns import masked_mean
from rrlhf.robust import Scores, difference_std


def clipped_policy_loss(log_ratio: Tensor, advantages: Tensor, mask: Tensor, clip_ratio: float) -> Tensor:
    """Return -mean min(rho A, clip(rho, 1 - clip_ratio, 1 + clip_ratio) A), rho = exp(log_ratio).

    PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7). All arguments [batch, tokens].
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_value: float) -> Tensor:
    """Return half the mean of the larger of the plain and the clipped squared error, [batch, tokens] each."""
    near = old_values + (values - old_values).clamp(-clip_value, clip_value)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (near - returns) ** 2), mask)


def approximate_kl(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of k3 = (rho - 1) - log rho: unbiased when the old policy sampled, and never negative.

    log_ratio: log rho, of the new policy to the old one; [batch, tokens]. Schulman 2020 (rrlhf/kl.py).
    """
    return masked_mean(k3(-log_ratio), mask)


def bradley_terry(difference: Tensor, margin: float = 0.0) -> Tensor:
    """Return -log sigmoid(r_chosen - r_rejected - margin) per pair (Bradley and Terry 1952).

    A margin asks every pair to be ranked right by more than that (Touvron et al. 2023, arXiv 2307.09288, eq. 2).
    """
    return -logsigmoid(difference - margin)


def smoothed(loss: Tensor, flipped_loss: Tensor, flip_rate: float) -> Tensor:
    """Return (1 - e) * loss + e * flipped_loss for labels of which a share e is wrong.

    The cross-entropy with a label believed at 1 - e: conservative DPO's (Mitchell 2023; Chowdhury et al. 2024,
    arXiv 2403.00409). For the Bradley-Terry loss it is least where sigmoid(d) = 1 - e, so no pair asks for an endless
    difference.
    """
    return torch.lerp(loss, flipped_loss, flip_rate)


def dpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Return -log sigmoid(beta * (chosen - rejected)) per pair, for log-ratios log(pi / pi_ref) of whole responses.

    Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): the Bradley-Terry loss of the
    implicit rewards beta * log(pi / pi_ref). label_smoothing: share of labels believed to be wrong (see `smoothed`).
    chosen, rejected: [batch], nats.
    """
    margin = beta * (chosen - rejected)
    return smoothed(bradley_terry(margin), bradley_terry(-margin), label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return (chosen - rejected - 1 / (2 beta))^2 per pair, for log-ratios log(pi / pi_ref) of whole responses [batch].

    Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, eq. 17; beta is its tau): no pair asks for an
    endless difference, however certain its label.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return (r_chosen + r_rejected)^2, which fixes the offset that Bradley-Terry leaves open.

    Eisenstein et al. 2023 (arXiv 2312.09244, section 2).
    """
    return (chosen + rejected) ** 2


def dro_weights(losses: Tensor, temperature: float, cap: float) -> Tensor:
    """Return the weight of each row [batch, ...] of the worst distribution near the data's, without gradient.

    Instance reweighting (IR-DRO, arXiv 2402.14270): w ~ exp((loss - max) / temperature) with mean 1 over the batch.
    Then no weight is above `cap`: where labels are noisy, the highest losses are the wrong labels.
    """
    scaled = losses.detach() / temperature
    return (scaled.softmax(dim=0) * len(losses)).clamp(max=cap)


def gaussian_log_odds(chosen: Scores, rejected: Scores, margin: float = 0.0) -> Tensor:
    """Return the log-odds, [batch, heads], that the chosen one of two Gaussian rewards wins by more than `margin`.

    E[sigmoid(d - margin)] for a difference d ~ N(m, v), its noise integrated out, is close to
    sigmoid((m - margin) / sqrt(1 + pi v / 8)) (MacKay 1992, eq. 10).
    """
    variance = difference_std(chosen, rejected) ** 2
    return (chosen.mean - rejected.mean - margin) / torch.sqrt(1 + math.pi / 8 * variance)


def gaussian_bradley_terry(chosen: Scores, rejected: Scores, margin: float = 0.0) -> Tensor:
    """Return the Bradley-Terry loss of two Gaussian rewards, their noise integrated out, [batch, heads].

    A head that cannot tell two responses apart lowers its loss by admitting a larger standard deviation. With
    standard deviations of 0 it is the plain Bradley-Terry loss.
    """
    return bradley_terry(gaussian_log_odds(chosen, rejected, margin))


def reparameterised_mse(scores: Scores, target: Tensor, noise: Tensor) -> Tensor:
    """Return (mu + sigma * eps - target)^2, [batch, heads]: stage 2 of BRME (arXiv 2409.15360).

    Its expectation over eps is (mu - target)^2 + sigma^2, so it drives sigma to its floor.
    """
    return (scores.mean + scores.std * noise - target) ** 2


def gaussian_nll(scores: Scores, target: Tensor) -> Tensor:
    """Return -log N(target; mu, sigma) without its constant, [batch, heads]."""
    return scores.std.log() + 0.5 * ((target - scores.mean) / scores.std) ** 2
