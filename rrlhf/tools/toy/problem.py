"""The toy's world: a table of gold rewards, labels on part of it, and the exact optimum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Worlds(NamedTuple):
    """Independent toy problems, one a seed; all of one shape."""

    gold: Tensor  # [seeds, prompts, responses], mean 0 and standard deviation 1 over the labelled cells
    labelled: Tensor  # [seeds, prompts, responses] bool: cells that occur in preferences


def make_worlds(seeds: int, prompts: int, responses: int, labelled: float, interaction: float) -> Worlds:
    """Draw gold rewards and choose which cells are labelled.

    gold = quality of the response + `interaction` * what this prompt makes of it, both standard normal: what was
    learned on some prompts helps on others, but does not say everything. Of every prompt's responses the share
    `labelled`, at least 2, is compared; the rest is the gap in coverage. World n depends on n alone.
    """
    compared = max(2, round(labelled * responses))
    gold, mask = [], []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        quality = torch.randn(responses, generator=generator)
        gold.append(quality + interaction * torch.randn(prompts, responses, generator=generator))
        order = torch.rand(prompts, responses, generator=generator).argsort(dim=1).argsort(dim=1)
        mask.append(order < compared)
    known = torch.stack(mask)
    return Worlds(standardise(torch.stack(gold), known), known)


def moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std [seeds, 1, 1, ...] over the mask of values [seeds, prompts, responses, ...]."""
    weight = mask.float().reshape(*mask.shape, *[1] * (values.dim() - 3))
    count = weight.sum((1, 2), keepdim=True)
    mean = (values * weight).sum((1, 2), keepdim=True) / count
    variance = ((values - mean) ** 2 * weight).sum((1, 2), keepdim=True) / (count - 1)
    return mean, variance.sqrt()


def standardise(values: Tensor, mask: Tensor) -> Tensor:
    """Return values with mean 0 and standard deviation 1 over each seed's mask."""
    mean, std = moments(values, mask)
    return (values - mean) / std


def optimum(reward: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return log pi for pi(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x), [..., prompts, responses].

    The maximum of E_pi[r] - beta KL(pi || pi_ref); reference: log pi_ref.
    """
    return (reference + reward / beta).log_softmax(dim=-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) in nats, averaged over prompts, of log-probabilities [..., prompts, responses]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)


def expected(reward: Tensor, log_policy: Tensor) -> Tensor:
    """Return E_pi[r], averaged over prompts, [...]."""
    return (log_policy.exp() * reward).sum(-1).mean(-1)
