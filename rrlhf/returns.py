"""From scores to advantages: token rewards, estimators of the advantage with and without a critic, whitening.

Masks are True where a token counts; responses are [batch, response tokens]. Where an estimator compares the responses
to one prompt, each run of `group` rows belongs to one prompt.
"""

import torch
from torch import Tensor


def token_rewards(score: Tensor, kl: Tensor, mask: Tensor, kl_weight: float) -> Tensor:
    """Return r_t = -kl_weight * kl_t, plus the score at each response's last token.

    score: [batch]; kl and mask: [batch, tokens]. kl: an estimate of KL(pi || pi_ref) at each token in nats, of
    rrlhf/kl.py; with k1, the log-ratio, this is Ziegler et al. 2019 (arXiv 1909.08593, eq. 2).
    """
    rewards = -kl_weight * kl * mask
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


def rewards_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """Return A_t = sum of r_t and all rewards after it, [batch, tokens]: the return itself, no critic.

    With the score at the last token it is r - kl_weight * sum_{i >= t} kl_i, the advantage of REINFORCE++ (Hu 2025,
    arXiv 2501.03262) before it is normalised over the whole batch.
    """
    return (rewards * mask).flip(1).cumsum(1).flip(1) * mask


def rloo(rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    """Return A = R - mean of the R of the prompt's other responses, at every token, [batch, tokens].

    R is a response's sum of rewards. REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740, section 3.3).
    """
    total = _totals(rewards, mask, group)
    others = (total.sum(1, keepdim=True) - total) / (group - 1)
    return (total - others).flatten()[:, None] * mask


def grpo(rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    """Return A = (R - mean(R)) / std(R) over the responses to one prompt, at every token, [batch, tokens].

    R is a response's sum of rewards. Group relative policy optimisation with outcome rewards (Shao et al. 2024,
    arXiv 2402.03300, section 4.1.2). The 1e-4 under the fraction keeps differences of rounding between equal
    responses from becoming advantages.
    """
    total = _totals(rewards, mask, group)
    centred = total - total.mean(1, keepdim=True)
    return (centred / (total.std(1, keepdim=True) + 1e-4)).flatten()[:, None] * mask


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the values whose mask is True."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale the values whose mask is True to mean 0 and variance 1; the rest becomes 0."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def _totals(rewards: Tensor, mask: Tensor, group: int) -> Tensor:
    """Return each response's sum of rewards, [prompts, group]."""
    return (rewards * mask).sum(1).view(-1, group)
