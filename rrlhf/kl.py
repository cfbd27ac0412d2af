"""How far a policy is from its reference: estimates of KL(pi || pi_ref), and a controller of what a nat costs.

Every estimate is made of log_ratio = log(pi / pi_ref) of tokens that pi sampled (Schulman 2020, "Approximating KL
divergence", http://joschu.net/blog/kl-approx.html); shapes stay as they are.
"""

from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """Return log_ratio: unbiased, but of either sign. As a loss it is worthless: its gradient has expectation 0."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Return log_ratio^2 / 2: biased, never negative. As a loss, its gradient's expectation is KL(pi || pi_ref)'s."""
    return 0.5 * log_ratio**2


def k3(log_ratio: Tensor) -> Tensor:
    """Return exp(-log_ratio) - 1 + log_ratio: unbiased and never negative.

    As a loss it pulls elsewhere than its value says: its gradient's expectation is that of KL(pi_ref || pi).
    """
    return (-log_ratio).exp() - 1 + log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def adapted_weight(kl_weight: float, kl: float, *, target: float, responses: int, horizon: float) -> float:
    """Return the weight after an update of so many responses: higher where their KL (nats) was above the target.

    beta * (1 + responses / horizon * clip((kl - target) / target, -0.2, 0.2)): the proportional controller of the
    log of beta of Ziegler et al. 2019 (arXiv 1909.08593, section 2.2), whose K_beta = 0.1 is a horizon of ten updates.
    """
    error = min(max((kl - target) / target, -0.2), 0.2)
    return kl_weight * (1 + error * responses / horizon)
