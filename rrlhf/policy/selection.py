"""Best of n: sample n responses and keep the one that a proxy scores highest. What that does, for every n at once."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def best_of_n_curve(proxy: Tensor, values: Tensor, n_max: int) -> Tensor:
    """Return the expected value of the best of n by proxy for n = 1 to n_max, [..., n_max] float64.

    proxy, values: [..., samples], independent samples of one prompt in the last dimension. With samples sorted by
    proxy, i = 1 the lowest, the estimate is sum_i C(i-1, n-1) / C(samples, n) * value_i: the mean over all subsets of
    n samples, so it is unbiased (Nakano et al. 2021, arXiv 2112.09332, appendix; used by Gao et al. 2022, arXiv
    2210.10760). Among equal proxies every one is the best equally often: each counts as their mean.

    Raises ValueError when n_max is above the number of samples.
    """
    samples = proxy.shape[-1]
    if not 1 <= n_max <= samples:
        raise ValueError(f"the best of {n_max} cannot be told from {samples} samples: n is 1 to {samples}")
    ordered, order = proxy.sort(dim=-1)
    by_rank = values.double().gather(-1, order)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        by_rank = _shared_among_ties(ordered, by_rank)
    parts = [by_rank[..., first:] @ weights.to(by_rank.device) for first, weights in _blocks(samples, n_max)]
    return torch.cat(parts, dim=-1)


def best_of_n_weights(samples: int, n_max: int) -> Tensor:
    """Return P(the sample of rank i is the best of n) = C(i-1, n-1) / C(samples, n), [n_max, samples] float64.

    By recursion in n, w_n(i) = w_{n-1}(i) * (i-n+1) / (n-1) * n / (samples-n+1): no factorial overflows.
    """
    rank = torch.arange(1, samples + 1, dtype=torch.float64)
    n = torch.arange(2, n_max + 1, dtype=torch.float64)[:, None]
    step = (rank - n + 1).clamp(min=0) / (n - 1) * n / (samples - n + 1)
    return torch.cat([torch.full((1, samples), 1 / samples, dtype=torch.float64), step]).cumprod(dim=0)


@lru_cache(maxsize=8)
def _blocks(samples: int, n_max: int) -> list[tuple[int, Tensor]]:
    """Return the weights of every 64 n in a row from the first rank on that counts, [ranks, 64]: a third of the table.

    The best of many is hardly ever of low rank: what is left out is below 1e-20, far below rounding.
    """
    firsts = [
        (part, int((part.amax(0) > 1e-20).int().argmax())) for part in best_of_n_weights(samples, n_max).split(64)
    ]
    return [(first, part[:, first:].T.contiguous()) for part, first in firsts]


def chosen(proxy: Tensor) -> Tensor:
    """Return the index of the highest proxy [..., n] in the last dimension, the first of equal ones, [...].

    Samples are exchangeable, so the first of equal ones is any of them.
    """
    highest = proxy == proxy.amax(dim=-1, keepdim=True)
    return highest.int().argmax(dim=-1)


def best_of_n_kl(n: int) -> float:
    """Return log n - (n - 1) / n, in nats: an upper bound of KL(best of n || the model that is sampled).

    Equal to it where no two responses have the same score; where few responses are likely, as for short ones, the
    true KL is lower (Beirami et al. 2024, arXiv 2401.01879, theorem 1).
    """
    return math.log(n) - (n - 1) / n


def curve_points(n_max: int, most: int = 48) -> list[int]:
    """Return the n at which a curve from 1 to n_max is told: at most about `most`, evenly spaced on a log axis."""
    return sorted({round(n_max ** (i / most)) for i in range(most + 1)})


def _shared_among_ties(ordered: Tensor, values: Tensor) -> Tensor:
    """Replace each value by the mean over the run of equal proxies that it stands in, both [..., samples]."""
    run = torch.nn.functional.pad((ordered[..., 1:] != ordered[..., :-1]).cumsum(-1), (1, 0))
    sums = torch.zeros_like(values).scatter_add(-1, run, values)
    counts = torch.zeros_like(values).scatter_add(-1, run, torch.ones_like(values))
    return (sums / counts.clamp(min=1)).gather(-1, run)
