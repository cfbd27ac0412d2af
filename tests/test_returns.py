import pytest
import torch

from rrlhf.returns import gae, masked_mean, token_rewards, whiten


def ragged_mask(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def slow_gae(rewards, values, length, gae_lambda):
    """The definition, term by term: sum over l of lambda^l * delta_{t+l}, without the recursion."""
    padded = [*values[:length].tolist(), 0.0]
    delta = [rewards[t].item() + padded[t + 1] - padded[t] for t in range(length)]
    return [sum(gae_lambda**k * delta[t + k] for k in range(length - t)) for t in range(length)]


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_gae_equals_its_definition_on_ragged_rows(gae_lambda):
    lengths = [1, 4, 7]
    rewards, values = torch.randn(2, 3, 7, dtype=torch.float64)
    mask = ragged_mask(lengths, 7)
    advantages = gae(rewards * mask, values * mask, mask, gae_lambda)
    for row, length in enumerate(lengths):
        assert advantages[row, :length].tolist() == pytest.approx(
            slow_gae(rewards[row], values[row], length, gae_lambda), abs=1e-12
        )
        assert (advantages[row, length:] == 0).all()


def test_with_lambda_one_advantage_plus_value_is_the_sum_of_rewards_to_come():
    rewards, values = torch.randn(2, 2, 5, dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.bool)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(gae(rewards, values, mask, 1.0) + values, to_come)


def test_what_lies_behind_the_end_never_matters():
    rewards, values = torch.randn(2, 2, 6)
    mask = ragged_mask([3, 6], 6)
    before = gae(rewards * mask, values, mask, 0.9)
    assert torch.equal(gae(rewards * mask, torch.where(mask, values, 99.0), mask, 0.9), before)


def test_the_score_is_paid_at_the_last_token_and_kl_at_every_token():
    mask = ragged_mask([2, 3], 3)
    rewards = token_rewards(torch.tensor([5.0, 7.0]), torch.ones(2, 3), mask, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 4.9, 0.0], [-0.1, -0.1, 6.9]]))


def test_whitened_values_have_mean_zero_and_variance_one_under_the_mask():
    mask = ragged_mask([2, 5, 9], 9)
    white = whiten(torch.randn(3, 9, dtype=torch.float64) * 3 + 4, mask)
    assert masked_mean(white, mask).item() == pytest.approx(0, abs=1e-12)
    assert masked_mean(white**2, mask).item() == pytest.approx(1, abs=1e-6)
    assert (white[~mask] == 0).all()
