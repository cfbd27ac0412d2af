"""From scores to advantages: token rewards, generalised advantage estimation, whitening.

Masks are True where a token counts; responses are [batch, response tokens].
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_rewards(score: Tensor, log_ratio: Tensor, mask: Tensor, kl_weight: float) -> Tensor:
    """Return r_t = -kl_weight * log(pi / pi_ref)_t, plus the score at each response's last token.

    score: [batch]; log_ratio and mask: [batch, tokens]. The log-ratio of the sampled token is the unbiased k1
    estimate of the KL (Ziegler et al. 2019, arXiv 1909.08593, eq. 2).
    """
    rewards = -kl_weight * log_ratio * mask
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, score[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: float) -> Tensor:
    """Return advantages A_t = sum_l gae_lambda^l * delta_{t+l} with delta_t = r_t + V_{t+1} - V_t, [batch, tokens].

    Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16) without discount; the value
    after the last token is 0.
    """
    following = torch.nn.functional.pad(values[:, 1:] * mask[:, 1:], (0, 1))
    delta = (rewards + following - values) * mask
    advantage = torch.zeros_like(delta[:, 0])
    advantages = torch.empty_like(delta)
    for t in reversed(range(delta.shape[1])):
        advantage = delta[:, t] + gae_lambda * advantage
        advantages[:, t] = advantage
    return advantages * mask


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the values whose mask is True."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale the values whose mask is True to mean 0 and variance 1; the rest becomes 0."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask
