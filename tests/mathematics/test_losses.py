import math

import pytest
import torch

from rrlhf.losses import (
    approximate_kl,
    bradley_terry,
    centring,
    clipped_policy_loss,
    clipped_value_loss,
    dpo,
    dro_weights,
    gaussian_bradley_terry,
    gaussian_nll,
    ipo,
    reparameterised_mse,
    smoothed,
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


def slow_value_loss(values, olds, targets, keep, clip):
    terms = [
        max((value - target) ** 2, (old + max(min(value - old, clip), -clip) - target) ** 2)
        for value, old, target, kept in zip(values, olds, targets, keep, strict=True)
        if kept
    ]
    return 0.5 * sum(terms) / len(terms)


def test_value_loss_equals_the_loop_over_tokens():
    values, olds, targets = torch.randn(3, 4, 6, dtype=torch.float64)
    mask = torch.rand(4, 6) > 0.4
    expected = slow_value_loss(*(each.flatten().tolist() for each in (values, olds, targets, mask)), 0.2)
    assert clipped_value_loss(values, olds, targets, mask, 0.2).item() == pytest.approx(expected, abs=1e-12)


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


def test_a_margin_moves_the_loss_to_the_left():
    difference = torch.linspace(-3, 3, 7, dtype=torch.float64)
    assert bradley_terry(torch.tensor([0.5]).double(), 0.5).item() == pytest.approx(math.log(2), abs=1e-12)
    torch.testing.assert_close(bradley_terry(difference, 0.7), bradley_terry(difference - 0.7), rtol=0, atol=1e-12)


def test_gaussians_without_spread_are_plain_bradley_terry():
    chosen, rejected = torch.randn(2, 5, 3, dtype=torch.float64)
    none = torch.zeros(5, 3, dtype=torch.float64)
    found = gaussian_bradley_terry(Scores(chosen, none), Scores(rejected, none), 0.3)
    torch.testing.assert_close(found, bradley_terry(chosen - rejected, 0.3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.4])
def test_the_smoothed_loss_is_least_where_the_model_believes_the_label_at_one_minus_the_rate(rate):
    best = math.log((1 - rate) / rate)
    difference = torch.tensor([best], dtype=torch.float64, requires_grad=True)
    loss = smoothed(bradley_terry(difference), bradley_terry(-difference), rate).sum()
    loss.backward()
    entropy = -(1 - rate) * math.log(1 - rate) - rate * math.log(rate)
    assert loss.item() == pytest.approx(entropy, abs=1e-12)
    assert difference.grad.item() == pytest.approx(0, abs=1e-12)


def test_smoothing_at_rate_zero_changes_nothing():
    loss, flipped = torch.rand(2, 6, 2)
    assert torch.equal(smoothed(loss, flipped, 0.0), loss)


def test_centring_is_least_for_opposite_rewards_and_finds_the_offset_that_bradley_terry_leaves_open():
    chosen, rejected = torch.tensor([2.0, 1.0]).double(), torch.tensor([-2.0, 1.0]).double()
    assert centring(chosen, rejected).tolist() == [0.0, 4.0]
    offset = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    bradley_terry((chosen + offset) - (rejected + offset)).sum().backward()
    assert offset.grad.item() == pytest.approx(0, abs=1e-12)
    best = -(chosen + rejected).mean() / 2
    moved = [side + best for side in (chosen, rejected)]
    assert centring(*moved).mean() <= min(
        centring(chosen + o, rejected + o).mean() for o in torch.linspace(-2, 2, 41).double()
    )


def test_dro_weights_equal_the_loop_and_average_to_one():
    losses = torch.rand(7, 3, dtype=torch.float64) * 3
    found = dro_weights(losses, 0.5, cap=1e9)
    for head in range(3):
        column = losses[:, head].tolist()
        raw = [math.exp((loss - max(column)) / 0.5) for loss in column]
        expected = [weight * 7 / sum(raw) for weight in raw]
        assert found[:, head].tolist() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(found.mean(0), torch.ones(3).double())


def test_dro_weights_end_at_the_cap_and_turn_uniform_as_the_temperature_grows():
    losses = torch.tensor([0.0, 0.0, 0.0, 9.0])
    assert dro_weights(losses, 0.1, cap=2.5).max() == 2.5
    torch.testing.assert_close(dro_weights(losses, 1e6, cap=5.0), torch.ones(4), atol=1e-4, rtol=0)


def test_no_gradient_flows_through_dro_weights():
    losses = torch.rand(4, requires_grad=True)
    assert not dro_weights(losses, 0.5, cap=5.0).requires_grad
    (losses * dro_weights(losses, 0.5, cap=5.0)).sum().backward()
    torch.testing.assert_close(losses.grad, dro_weights(losses, 0.5, cap=5.0))


def test_training_on_reparameterised_mse_takes_sigma_to_its_floor():
    generator = torch.Generator().manual_seed(0)
    mean, log_std = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_std], lr=0.2)
    for _ in range(600):
        scores = Scores(mean.expand(64, 1), 0.05 + log_std.exp().expand(64, 1))
        loss = reparameterised_mse(scores, torch.ones(64, 1), torch.randn(64, 1, generator=generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mean.item() == pytest.approx(1.0, abs=0.02)
    assert 0.05 + log_std.exp().item() < 0.06


def slow_dpo(policy, reference, beta, flip_rate):
    """Eq. 7 of arXiv 2305.18290 with probabilities, not log-ratios, mixed as conservative DPO does."""
    (chosen, rejected), (ref_chosen, ref_rejected) = policy, reference
    odds = ((chosen / ref_chosen) / (rejected / ref_rejected)) ** beta
    return -(1 - flip_rate) * math.log(odds / (1 + odds)) - flip_rate * math.log(1 / (1 + odds))


@pytest.mark.parametrize("flip_rate", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("beta", [0.05, 1.0, 3.0])
def test_dpo_equals_its_definition_by_probabilities(beta, flip_rate):
    torch.manual_seed(3)
    policy, reference = torch.rand(2, 5, 2, dtype=torch.float64).clamp(min=1e-3)
    chosen, rejected = (policy / reference).log().unbind(1)
    expected = [slow_dpo(*row, beta, flip_rate) for row in zip(policy.tolist(), reference.tolist(), strict=True)]
    torch.testing.assert_close(
        dpo(chosen, rejected, beta, flip_rate), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12
    )


def test_dpo_at_the_reference_is_log_two_and_never_overflows():
    zero, far = torch.zeros(1), torch.tensor([1e4])
    assert dpo(zero, zero, 0.1).item() == pytest.approx(math.log(2))
    assert dpo(-far, far, 0.1).item() == pytest.approx(2000)
    assert dpo(far, -far, 0.1).item() == 0


def test_smoothed_dpo_is_least_where_the_label_is_believed_as_often_as_it_is_right():
    margin = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    best = margin[dpo(margin, torch.zeros_like(margin), 1.0, 0.2).argmin()]
    assert torch.sigmoid(best).item() == pytest.approx(0.8, abs=1e-4)


def test_ipo_is_least_at_a_finite_difference():
    difference = torch.tensor([0.0, 5.0, 7.0], dtype=torch.float64)
    assert ipo(difference + 2, torch.full((3,), 2.0).double(), 0.1).tolist() == pytest.approx([25, 0, 4])
