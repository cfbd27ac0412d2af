import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rrlhf.returns import gae, grpo, masked_mean, rewards_to_go, rloo, token_rewards, whiten


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


def slow_group_advantages(rewards, lengths, group, relative):
    """Advantages row by row in plain Python; `relative` compares one total with those of its group."""
    totals = [sum(row[:length]) for row, length in zip(rewards.tolist(), lengths, strict=True)]
    groups = [totals[i : i + group] for i in range(0, len(totals), group)]
    rows = [relative(members, i) for members in groups for i in range(group)]
    width = rewards.shape[1]
    return [[row] * length + [0.0] * (width - length) for row, length in zip(rows, lengths, strict=True)]


def slow_leave_one_out(members, i):
    return members[i] - statistics.mean(members[:i] + members[i + 1 :])


def slow_group_relative(members, i):
    return (members[i] - statistics.mean(members)) / (statistics.stdev(members) + 1e-4)


@st.composite
def groups(draw):
    group, prompts, width = draw(st.integers(2, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, width), min_size=group * prompts, max_size=group * prompts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rewards = torch.randn(group * prompts, width, generator=generator, dtype=torch.float64)
    return rewards, lengths, ragged_mask(lengths, width), group


@pytest.mark.parametrize(("estimator", "slow"), [(rloo, slow_leave_one_out), (grpo, slow_group_relative)])
@settings(deadline=None)  # the machine may be busy
@given(case=groups())
def test_estimators_over_groups_equal_the_loop_over_responses(estimator, slow, case):
    rewards, lengths, mask, group = case
    expected = torch.tensor(slow_group_advantages(rewards, lengths, group, slow), dtype=torch.float64)
    torch.testing.assert_close(estimator(rewards, mask, group), expected, atol=1e-9, rtol=1e-9)


@settings(deadline=None)  # the machine may be busy
@given(case=groups())
def test_rewards_to_go_equal_the_loop_over_tokens(case):
    rewards, lengths, mask, _ = case
    found = rewards_to_go(rewards, mask).tolist()
    for row, length, values in zip(found, lengths, rewards.tolist(), strict=True):
        assert row[:length] == pytest.approx([sum(values[t:length]) for t in range(length)], abs=1e-12)
        assert not any(row[length:])


@settings(deadline=None)  # the machine may be busy
@given(case=groups(), shift=st.floats(-5, 5), scale=st.floats(0.5, 10))
def test_what_a_whole_group_gains_never_matters(case, shift, scale):
    """An offset per prompt changes neither, and a scale passes through rloo and not through grpo."""
    rewards, lengths, mask, group = case
    at_the_end = torch.nn.functional.one_hot(torch.tensor(lengths) - 1, rewards.shape[1]) * shift
    moved = rewards * scale + at_the_end
    torch.testing.assert_close(rloo(moved, mask, group), rloo(rewards, mask, group) * scale, atol=1e-9, rtol=1e-9)
    spread = (rewards * mask).sum(1).view(-1, group).std(1).min().item()
    if spread > 0.1:  # below, the 1e-4 under the fraction shows
        torch.testing.assert_close(grpo(moved, mask, group), grpo(rewards, mask, group), atol=0.01, rtol=0.01)


@settings(deadline=None)  # the machine may be busy
@given(case=groups())
def test_rloo_is_the_centred_return_a_little_larger(case):
    rewards, _, mask, group = case
    total = (rewards * mask).sum(1).view(-1, group)
    centred = (total - total.mean(1, keepdim=True)).flatten()[:, None] * mask
    torch.testing.assert_close(rloo(rewards, mask, group), group / (group - 1) * centred, atol=1e-9, rtol=1e-9)


def test_responses_that_are_equally_good_but_for_rounding_have_no_advantage():
    rewards = torch.tensor([[1.0], [1.0 + 1e-7], [1.0], [1.0 - 1e-7]])
    assert grpo(rewards, torch.ones(4, 1, dtype=torch.bool), 4).abs().max() < 0.01


def test_without_a_critic_gae_with_lambda_one_is_the_reward_to_go():
    rewards, mask = torch.randn(3, 5, dtype=torch.float64), ragged_mask([2, 5, 3], 5)
    torch.testing.assert_close(gae(rewards * mask, torch.zeros(3, 5), mask, 1.0), rewards_to_go(rewards, mask))
