import math

import pytest
import torch

from rrlhf.losses import (
    approximate_kl,
    bradley_terry,
    clipped_policy_loss,
    clipped_value_loss,
    gaussian_bradley_terry,
    gaussian_nll,
    reparameterised_mse,
)
from rrlhf.robust import Scores


def slow_policy_loss(ratios, advantages, keep, clip):
    terms = [
        min(ratio * advantage, max(min(ratio, 1 + clip), 1 - clip) * advantage)
        for ratio, advantage, kept in zip(ratios, advantages, keep, strict=True)
        if kept
    ]
    return -sum(terms) / len(terms)


def test_policy_loss_equals_the_loop_over_tokens():
    log_ratio, advantages = torch.randn(2, 4, 6, dtype=torch.float64)
    mask = torch.rand(4, 6) > 0.4
    expected = slow_policy_loss(
        log_ratio.exp().flatten().tolist(), advantages.flatten().tolist(), mask.flatten().tolist(), 0.2
    )
    assert clipped_policy_loss(log_ratio, advantages, mask, 0.2).item() == pytest.approx(expected, abs=1e-12)


def test_no_gradient_flows_where_the_clip_holds_the_ratio():
    log_ratio = torch.tensor([[0.5, -0.5, 0.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0]])
    clipped_policy_loss(log_ratio, advantages, torch.ones(1, 3, dtype=torch.bool), 0.2).backward()
    assert log_ratio.grad.tolist()[0][:2] == [0.0, 0.0]
    assert log_ratio.grad[0, 2].item() == pytest.approx(-1 / 3)


def test_value_loss_takes_the_larger_of_plain_and_clipped_error():
    value, old, target = torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([[3.0]])
    loss = clipped_value_loss(value, old, target, torch.ones(1, 1, dtype=torch.bool), 0.2)
    assert loss.item() == pytest.approx(0.5 * (0.2 - 3.0) ** 2)


def test_k3_is_never_negative_and_its_mean_is_the_kl():
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
    log_ratio = q.log() - p.log()  # tokens come from p
    expected = (p * (p / q).log()).sum().item()
    k3 = log_ratio.exp() - 1 - log_ratio
    assert (k3 >= 0).all()
    assert (p * k3).sum().item() == pytest.approx(expected, abs=1e-12)
    one = approximate_kl(log_ratio[None, :1], torch.ones(1, 1, dtype=torch.bool))
    assert one.item() == pytest.approx(k3[0].item())


def test_bradley_terry_at_known_margins():
    losses = bradley_terry(torch.tensor([0.0, math.log(3)], dtype=torch.float64))
    assert losses.tolist() == pytest.approx([math.log(2), math.log(4 / 3)], abs=1e-12)


def test_bradley_terry_ignores_an_offset_per_prompt():
    chosen, rejected = Scores(torch.randn(4, 3), torch.rand(4, 3)), Scores(torch.randn(4, 3), torch.rand(4, 3))
    moved = [Scores(side.mean + 7.0, side.std) for side in (chosen, rejected)]
    torch.testing.assert_close(
        gaussian_bradley_terry(*moved), gaussian_bradley_terry(chosen, rejected), rtol=0, atol=1e-5
    )


def test_gaussian_bradley_terry_is_near_the_integral_it_stands_for():
    chosen, rejected = (
        Scores(torch.tensor([[m]]).double(), torch.tensor([[s]]).double()) for m, s in ((0.8, 0.9), (0.1, 0.4))
    )
    margin = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.distributions.Normal(0.7, math.hypot(0.9, 0.4)).log_prob(margin).exp()
    integral = torch.trapezoid(density * margin.sigmoid(), margin).item()
    assert (-gaussian_bradley_terry(chosen, rejected)).exp().item() == pytest.approx(integral, abs=0.005)


def test_a_head_that_is_wrong_lowers_its_loss_by_admitting_noise():
    std = torch.ones(1, 1, requires_grad=True)
    wrong, right = Scores(torch.tensor([[-1.0]]), std), Scores(torch.tensor([[1.0]]), std)
    gaussian_bradley_terry(wrong, right).sum().backward()
    assert std.grad.item() < 0


def test_reparameterised_mse_is_the_squared_error_plus_the_variance_so_sigma_falls():
    noise = torch.randn(400_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    std = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)
    loss = reparameterised_mse(
        Scores(torch.tensor([[1.5]]).double(), std), torch.tensor([[1.0]]).double(), noise
    ).mean()
    assert loss.item() == pytest.approx(0.5**2 + 0.7**2, rel=0.01)
    loss.backward()
    assert std.grad.item() == pytest.approx(2 * 0.7, rel=0.02)


def test_gaussian_nll_agrees_with_torch_distributions():
    mean, std, target = torch.randn(5, 3).double(), torch.rand(5, 3).double() + 0.1, torch.randn(5, 1).double()
    expected = -torch.distributions.Normal(mean, std).log_prob(target) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(gaussian_nll(Scores(mean, std), target), expected)
