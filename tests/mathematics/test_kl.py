"""KL: three estimates of one divergence, their values and their gradients, and what holds it near a target."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rrlhf.kl import ESTIMATORS, adapted_weight, k1, k2, k3

SEEDS = st.integers(0, 2**31)


def policies(seed, tokens=7):
    """Logits of a policy, with gradient, and the log-probabilities of another."""
    generator = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(2, tokens, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), other.log_softmax(0)


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def kl(p, q):
    """KL(p || q) in nats of two rows of log-probabilities."""
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("log_ratio", [-2.0, -0.1, 0.0, 0.3, 1.7])
def test_the_estimates_at_single_tokens_by_hand(log_ratio):
    x = torch.tensor(log_ratio, dtype=torch.float64)
    assert k1(x).item() == log_ratio
    assert k2(x).item() == pytest.approx(log_ratio * log_ratio / 2, abs=1e-12)
    assert k3(x).item() == pytest.approx(math.exp(-log_ratio) - 1 + log_ratio, abs=1e-12)


@settings(deadline=None)  # the machine may be busy
@given(SEEDS)
def test_k1_and_k3_are_unbiased_and_k2_and_k3_never_negative(seed):
    logits, reference = policies(seed)
    policy = logits.detach().log_softmax(0)
    log_ratio = policy - reference
    for estimate in (k1, k3):
        assert (policy.exp() * estimate(log_ratio)).sum().item() == pytest.approx(
            kl(policy, reference).item(), abs=1e-9
        )
    assert (k2(log_ratio) >= 0).all()
    assert (k3(log_ratio) >= -1e-15).all()  # rounding


@settings(deadline=None)  # the machine may be busy
@given(SEEDS, st.floats(1e-4, 1e-3))
def test_k2_is_the_kl_of_policies_that_are_near(seed, step):
    logits, _ = policies(seed)
    policy = logits.detach().log_softmax(0)
    reference = (policy + step * torch.linspace(-1, 1, 7)).log_softmax(0)
    found = (policy.exp() * k2(policy - reference)).sum().item()
    assert found == pytest.approx(kl(policy, reference).item(), rel=20 * step)


@settings(deadline=None)  # the machine may be busy
@given(SEEDS)
def test_the_gradient_of_each_estimate_as_a_loss(seed):
    """Of tokens that the policy sampled: nothing for k1, that of KL(pi || ref) for k2, of KL(ref || pi) for k3."""
    logits, reference = policies(seed)
    policy = logits.log_softmax(0)
    sampled = policy.detach().exp()
    wanted = {
        "k1": torch.zeros(7, dtype=torch.float64),
        "k2": gradient(kl(policy, reference), logits),
        "k3": gradient(kl(reference, logits.log_softmax(0)), logits),
    }
    for name, estimate in ESTIMATORS.items():
        found = gradient((sampled * estimate(logits.log_softmax(0) - reference)).sum(), logits)
        torch.testing.assert_close(found, wanted[name], atol=1e-9, rtol=0)


def test_the_weight_follows_the_error_and_no_faster_than_a_fifth():
    def adapted(kl):
        return adapted_weight(0.5, kl, target=6.0, responses=32, horizon=320)

    assert adapted(6.0) == 0.5
    assert adapted(6.6) == pytest.approx(0.5 * (1 + 0.1 * 0.1))
    assert adapted(100.0) == pytest.approx(0.5 * (1 + 0.1 * 0.2))
    assert adapted(-3.0) == pytest.approx(0.5 * (1 - 0.1 * 0.2))


@settings(deadline=None)  # the machine may be busy
@given(st.floats(1e-3, 10), st.floats(0.5, 20), st.floats(-5, 50))
def test_the_weight_stays_positive_and_moves_the_right_way(weight, target, found):
    moved = adapted_weight(weight, found, target=target, responses=64, horizon=320)
    assert moved > 0
    assert (moved - weight) * (found - target) >= 0


def test_the_controller_reaches_its_target():
    """A policy that stands at its optimum for each weight, where KL falls as the weight rises, ends at the target."""
    weight = 0.01
    for _ in range(2000):
        weight = adapted_weight(weight, 0.5 / weight, target=5.0, responses=32, horizon=320)
    assert 0.5 / weight == pytest.approx(5.0, rel=1e-3)
