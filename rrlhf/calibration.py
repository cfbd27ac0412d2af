"""How well a reward model ranks and how honest its probabilities are, on held-out pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A mean with its standard error over n independent units."""

    mean: float
    stderr: float
    n: int


def estimate(values: Tensor, groups: Tensor | None = None) -> Estimate:
    """Return the mean and standard error of values [rows]; rows of one group (a prompt) count as one unit."""
    values = values.double()
    if groups is not None:
        _, group = groups.unique(return_inverse=True)
        sums = torch.zeros(int(group.max()) + 1, dtype=torch.float64).scatter_add_(0, group, values)
        values = sums / torch.bincount(group)
    n = len(values)
    stderr = values.std().item() / n**0.5 if n > 1 else float("nan")
    return Estimate(values.mean().item(), stderr, n)


def correct(margin: Tensor) -> Tensor:
    """Return per pair 1 when the chosen response scores higher, 0.5 on a tie, else 0."""
    return (margin > 0).double() + 0.5 * (margin == 0).double()


def expected_calibration_error(probability: Tensor, bins: int = 10) -> float:
    """Return the ECE of P(chosen wins) [pairs], each pair read from its likelier side.

    sum_b n_b / n * |accuracy_b - confidence_b| over equal bins of confidence in [0.5, 1] (Guo et al. 2017,
    arXiv 1706.04599, eq. 5).
    """
    confidence = torch.maximum(probability, 1 - probability).double()
    hit = correct(probability - 0.5)
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).scatter_add_(0, bin_of, hit - confidence)
    return (gaps.abs().sum() / len(confidence)).item()
