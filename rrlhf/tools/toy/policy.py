"""The toy's policies: one three-layer network for every seed and arm, all trained at once on the exact objective.

With 8 responses the expectation over a policy's samples is a sum, so there is no sampling noise and PPO would only
approximate what is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from rrlhf.tools.toy.problem import expected, kl

HIDDEN = 32
LEARNING_RATE = 0.01


class Policies(nn.Module):
    """Three-layer networks from a one-hot prompt to logits of the responses, [seeds, arms] of them.

    The arms of a seed start from the same weights; the start is the reference policy.
    """

    def __init__(self, seeds: int, arms: int, prompts: int, responses: int) -> None:
        super().__init__()
        widths = [prompts, HIDDEN, HIDDEN, responses]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for wide, narrow in pairwise(widths):
            start = torch.stack(
                [
                    torch.randn(wide, narrow, generator=torch.Generator().manual_seed(seed)) * wide**-0.5
                    for seed in range(seeds)
                ]
            )
            self.weights.append(nn.Parameter(start[:, None].repeat(1, arms, 1, 1)))
            self.biases.append(nn.Parameter(torch.zeros(seeds, arms, 1, narrow)))

    def forward(self) -> Tensor:
        """Return log pi, [seeds, arms, prompts, responses]."""
        states = self.weights[0] + self.biases[0]  # the product of one-hot prompts and a matrix is the matrix
        for weight, bias in zip(list(self.weights)[1:], list(self.biases)[1:], strict=True):
            states = states.tanh() @ weight + bias
        log_policy: Tensor = states.log_softmax(dim=-1)
        return log_policy


def train(rewards: Tensor, beta: float, steps: int) -> Iterator[tuple[int, Tensor]]:
    """Maximise E_pi[r] - beta KL(pi || pi_ref) of every policy; yield each number of steps done with log pi.

    rewards: [seeds, arms, prompts, responses]. First comes step 0, the reference policy.
    """
    seeds, arms, prompts, responses = rewards.shape
    policies = Policies(seeds, arms, prompts, responses)
    optimizer = torch.optim.Adam(policies.parameters(), lr=LEARNING_RATE)
    reference = policies().detach()
    for step in range(steps + 1):
        log_policy = policies()
        yield step, log_policy.detach()
        objective = expected(rewards, log_policy) - beta * kl(log_policy, reference)
        optimizer.zero_grad()
        (-objective.sum()).backward()
        optimizer.step()
