"""Whether two ways to run a network say the same: tried on a few tokens, since no list of models is ever complete."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-3  # rounding makes 1e-6, with rare tokens 2e-4; layers of another make, several 1e-2


def trial_tokens(network: Any) -> Tensor:
    """Return a few tokens [1, 6] from all over the vocabulary, whose first entries are often control tokens."""
    return torch.linspace(0, network.config.vocab_size - 1, 8, device=network.device).long()[None, 1:-1]


def say_the_same(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ by rounding only, as a share of their norm: large states carry large rounding."""
    return one.shape == other.shape and bool((one - other).norm() <= TOLERANCE * other.norm())
