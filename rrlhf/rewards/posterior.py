"""What a Bradley-Terry head on fixed features does not know: the Laplace posterior of its weights.

Heads that are trained on the same few pairs agree far from them, since weight decay pulls them all to 0 in every
direction that no pair covers; the posterior of one head is wide there. Last-layer Laplace for reward models: Yang et
al. 2024 (arXiv 2402.13210), Zhang et al. 2024 (arXiv 2403.05171). Pure: tensors in, tensors out.
"""

import math
from typing import NamedTuple

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import logsigmoid

PRECISIONS = (1e-2, 1e7)  # between which the prior's precision is looked for
NEWTON_STEPS = 50
CLOSE = 1e-12  # relative change of the objective at which Newton's method has arrived
SHORTEST_STEP = 1e-6  # share of a Newton step
PRECISION_TO = 0.02  # how exactly the logarithm of the best precision is found: the evidence is flat there


class Posterior(NamedTuple):
    """Weights of a linear head, theta ~ N(mode, H^-1), for features of one space."""

    mode: Tensor  # [width]
    factor: Tensor  # [width, width] lower triangular, factor factor' = H
    precision: float  # of the prior, theta ~ N(0, I / precision)
    log_evidence: float  # log p(labels | precision), by Laplace's method


def fit(differences: Tensor, precision: float | None = None) -> Posterior:
    """Return the posterior of the Bradley-Terry likelihood of pairs, whose features differ by `differences`.

    p(chosen beats rejected) = sigmoid(d . theta), d = x_chosen - x_rejected, [pairs, width]; the prior's precision is
    the one given, or that of the greatest evidence (MacKay 1992), which reads no pair but these. In float64.
    """
    d = differences.double()
    mode = d.new_zeros(d.shape[1])
    if precision is not None:
        return _laplace(d, precision, mode)

    def lack(log_precision: float) -> float:
        nonlocal mode  # where the next search begins: precisions that are close have modes that are close
        found = _laplace(d, math.exp(log_precision), mode)
        mode = found.mode
        return -found.log_evidence

    bounds = tuple(map(math.log, PRECISIONS))
    best = minimize_scalar(lack, bounds=bounds, method="bounded", options={"xatol": PRECISION_TO})
    return _laplace(d, math.exp(float(best.x)), mode)


def _laplace(d: Tensor, precision: float, start: Tensor) -> Posterior:
    """Find the mode by Newton's method from `start`, and the curvature there."""
    theta, objective = start, _objective(d, start, precision)
    for _ in range(NEWTON_STEPS):
        slope = precision * theta - d.T @ torch.sigmoid(-(d @ theta))
        step = torch.cholesky_solve(slope[:, None], _factor(d, theta, precision))[:, 0]
        size = 1.0
        while (new := _objective(d, theta - size * step, precision)) > objective and size > SHORTEST_STEP:
            size /= 2  # the objective is convex, so a short enough step lowers it
        if new > objective:
            break
        arrived = objective - new <= CLOSE * (1 + abs(objective))
        theta, objective = theta - size * step, new
        if arrived:
            break
    factor = _factor(d, theta, precision)
    half_log_det = float(factor.diagonal().log().sum())
    evidence = -objective + 0.5 * d.shape[1] * math.log(precision) - half_log_det
    return Posterior(theta, factor, precision, evidence)


def _objective(d: Tensor, theta: Tensor, precision: float) -> float:
    """Return sum_i softplus(-d_i . theta) + precision / 2 |theta|^2, the negative log posterior up to a constant."""
    return float(-logsigmoid(d @ theta).sum() + 0.5 * precision * theta.square().sum())


def _factor(d: Tensor, theta: Tensor, precision: float) -> Tensor:
    """Return the Cholesky factor of H = sum_i p_i (1 - p_i) d_i d_i' + precision I."""
    p = torch.sigmoid(d @ theta)
    curvature = (d * (p * (1 - p))[:, None]).T @ d
    factor: Tensor = torch.linalg.cholesky(
        curvature + precision * torch.eye(d.shape[1], dtype=d.dtype, device=d.device)
    )
    return factor


def whiten(factor: Tensor, offsets: Tensor) -> Tensor:
    """Return factor^-1 (x - x_ref), [batch, width]: its length is the posterior's standard deviation of the reward.

    offsets: features less those of the reference, x - x_ref. Only differences of rewards are identified, so sigma is
    that of the difference to the reference.
    """
    solved: Tensor = torch.linalg.solve_triangular(factor, offsets.T, upper=False)
    return solved.T
