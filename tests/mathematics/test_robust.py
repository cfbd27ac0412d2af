import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rrlhf.robust import (
    AGGREGATIONS,
    Scores,
    batch_robust_reward,
    certain,
    ellipsoid_reward,
    entropic_reward,
    gaussian_entropic_reward,
    head_spread,
    mean_reward,
    most_confident,
    nominal_reward,
    robust_reward,
    uwo_reward,
    worst_reward,
)

WEIGHTS = st.floats(0, 1)
CREDIBLE = st.floats(0, 8)


@st.composite
def scores(draw, min_heads=1):
    batch, heads = draw(st.integers(1, 6)), draw(st.integers(min_heads, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mean = torch.randn(batch, heads, generator=generator, dtype=torch.float64)
    return Scores(mean, torch.rand(batch, heads, generator=generator, dtype=torch.float64) + 0.01)


def test_the_mixture_of_a_small_table_by_hand():
    table = Scores(torch.tensor([[1.0, 3.0, -1.0], [0.5, 0.2, 0.9]]), torch.tensor([[0.3, 0.1, 0.2], [0.1, 0.2, 0.3]]))
    assert most_confident(table).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert nominal_reward(table).tolist() == [3.0, 0.5]
    assert worst_reward(table).tolist() == [-1.0, torch.tensor(0.2).item()]
    expected = torch.tensor([0.4 * 3.0 + 0.6 * -1.0, 0.4 * 0.5 + 0.6 * 0.2])
    torch.testing.assert_close(robust_reward(table, 0.4, 0.0), expected)
    assert worst_reward(table, 2.0).tolist() == pytest.approx([-1.4, -0.2])  # of heads 2 and 1
    expected = torch.tensor([0.4 * 3.0 + 0.6 * -1.4, 0.4 * 0.5 + 0.6 * -0.2])
    torch.testing.assert_close(robust_reward(table, 0.4, 2.0), expected)


def test_heads_that_are_equally_sure_are_nominal_together():
    table = Scores(torch.tensor([[1.0, 3.0, -1.0]]), torch.tensor([[0.1, 0.1, 0.2]]))
    assert most_confident(table).tolist() == [[0.5, 0.5, 0]]
    assert nominal_reward(table).tolist() == [2.0]


@given(scores(), WEIGHTS, CREDIBLE)
def test_worst_is_never_above_robust_and_robust_never_above_nominal(table, weight, credible):
    robust = robust_reward(table, weight, credible)
    assert (worst_reward(table, credible) <= robust + 1e-12).all()
    assert (robust <= robust_reward(table, weight, 0.0) + 1e-12).all()
    assert (robust <= nominal_reward(table) + 1e-12).all()
    assert (worst_reward(table) <= mean_reward(table) + 1e-12).all()


@given(scores(), CREDIBLE)
def test_the_ends_of_the_weight_are_the_nominal_and_the_worst_reward(table, credible):
    torch.testing.assert_close(robust_reward(table, 1.0, credible), nominal_reward(table))
    torch.testing.assert_close(robust_reward(table, 0.0, credible), worst_reward(table, credible))


@given(scores(), WEIGHTS, st.randoms())
def test_the_order_of_heads_does_not_matter(table, weight, random):
    order = list(range(table.mean.shape[1]))
    random.shuffle(order)
    shuffled = Scores(table.mean[:, order], table.std[:, order])
    torch.testing.assert_close(robust_reward(shuffled, weight, 2.0), robust_reward(table, weight, 2.0))


@given(scores(), WEIGHTS, st.floats(-5, 5), st.floats(0.1, 10))
def test_shift_and_scale_of_all_heads_pass_through(table, weight, shift, scale):
    moved = Scores(table.mean * scale + shift, table.std * scale)
    torch.testing.assert_close(robust_reward(moved, weight, 2.0), robust_reward(table, weight, 2.0) * scale + shift)
    torch.testing.assert_close(head_spread(moved), head_spread(table) * scale)


@given(scores(), WEIGHTS, CREDIBLE)
def test_one_head_is_paid_its_mean_less_its_share_of_the_credible_set(table, weight, credible):
    one = Scores(table.mean[:, :1], table.std[:, :1])
    paid = one.mean[:, 0] - (1 - weight) * credible * one.std[:, 0]
    torch.testing.assert_close(robust_reward(one, weight, credible), paid)


@given(scores(min_heads=2))
def test_the_mean_of_minima_is_at_most_the_minimum_of_means(table):
    assert worst_reward(table).mean() <= table.mean.mean(0).min() + 1e-12


SETTINGS = {
    "robust": {"nominal_weight": 0.3, "credible": 2.0},
    "batch_robust": {"nominal_weight": 0.3, "credible": 2.0},
    "worst": {"credible": 2.0},
    "uwo": {"uncertainty_weight": 0.7},
    "mean_minus_std": {"uncertainty_weight": 0.7},
    "lower_bound": {"uncertainty_weight": 0.7},
    "entropic": {"temperature": 0.9},
    "gaussian_entropic": {"temperature": 0.9},
}
CASES = [(name, SETTINGS.get(name, {})) for name in AGGREGATIONS if name != "ellipsoid"]  # that one: test_posterior.py


def slow(name, means, stds, batch, nominal_weight=0.0, credible=0.0, uncertainty_weight=0.0, temperature=1.0):
    """One response's reward from its heads' means and deviations, in plain numbers; `batch`: everybody's of both."""
    nominal = means[stds.index(min(stds))]
    average = sum(means) / len(means)
    variance = sum((mean - average) ** 2 for mean in means) / len(means)
    low = [mean - credible * std for mean, std in zip(means, stds, strict=True)]
    totals = [sum(m[head] - credible * s[head] for m, s in batch) for head in range(len(means))]
    lowest_of_batch = low[totals.index(min(totals))]
    if name == "gaussian_entropic":
        means = [mean - std**2 / (2 * temperature) for mean, std in zip(means, stds, strict=True)]
    return {
        "batch_robust": lambda: nominal_weight * nominal + (1 - nominal_weight) * lowest_of_batch,
        "constant": lambda: 0.0,
        "entropic": lambda: -temperature * math.log(statistics.mean(math.exp(-m / temperature) for m in means)),
        "gaussian_entropic": lambda: (
            -temperature * math.log(statistics.mean(math.exp(-m / temperature) for m in means))
        ),
        "lower_bound": lambda: min(m - uncertainty_weight * s for m, s in zip(means, stds, strict=True)),
        "mean": lambda: average,
        "mean_minus_std": lambda: average - uncertainty_weight * variance**0.5,
        "median": lambda: statistics.median(means),
        "nominal": lambda: nominal,
        "robust": lambda: nominal_weight * nominal + (1 - nominal_weight) * min(low),
        "uwo": lambda: average - uncertainty_weight * variance,
        "worst": lambda: min(low),
    }[name]()


@pytest.mark.parametrize(("name", "settings"), CASES)
@given(table=scores())
def test_every_aggregation_equals_its_slow_version(name, settings, table):
    means, stds = table.mean.tolist(), table.std.tolist()
    both = list(zip(means, stds, strict=True))
    expected = [slow(name, *row, both, **settings) for row in both]
    assert AGGREGATIONS[name](table, **settings).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("name", "settings"), CASES)
@given(table=scores(), random=st.randoms())
def test_no_aggregation_minds_the_order_of_heads(name, settings, table, random):
    order = list(range(table.mean.shape[1]))
    random.shuffle(order)
    shuffled = Scores(table.mean[:, order], table.std[:, order])
    torch.testing.assert_close(AGGREGATIONS[name](shuffled, **settings), AGGREGATIONS[name](table, **settings))


@pytest.mark.parametrize(("name", "settings"), [case for case in CASES if case[0] != "constant"])
@given(table=scores(), shift=st.floats(-5, 5))
def test_a_shift_of_all_heads_passes_through_every_aggregation(name, settings, table, shift):
    moved = Scores(table.mean + shift, table.std)
    torch.testing.assert_close(AGGREGATIONS[name](moved, **settings), AGGREGATIONS[name](table, **settings) + shift)


@pytest.mark.parametrize(("name", "settings"), [case for case in CASES if case[0] != "constant"])
@given(table=scores())
def test_one_sure_head_is_every_aggregation_of_itself(name, settings, table):
    sure = Scores(table.mean[:, :1], torch.zeros_like(table.std[:, :1]))
    torch.testing.assert_close(AGGREGATIONS[name](sure, **settings), sure.mean[:, 0])


@given(scores(), st.floats(0.05, 20))
def test_entropic_lies_between_the_minimum_and_the_mean_and_reaches_both(table, temperature):
    entropic = entropic_reward(table, temperature)
    assert (worst_reward(table) <= entropic + 1e-9).all()
    assert (entropic <= mean_reward(table) + 1e-9).all()
    torch.testing.assert_close(entropic_reward(table, 1e-4), worst_reward(table), atol=1e-3, rtol=0)
    torch.testing.assert_close(entropic_reward(table, 1e5), mean_reward(table), atol=1e-4, rtol=0)


@given(scores())
def test_uwo_is_entropic_to_second_order(table):
    """With c = 1 / (2 b) they differ by the third cumulant over 6 b^2, and by what falls with b^3."""
    third = ((table.mean - mean_reward(table)[:, None]) ** 3).mean(1)
    for temperature in (100.0, 1000.0):
        gap = entropic_reward(table, temperature) - uwo_reward(table, 1 / (2 * temperature))
        torch.testing.assert_close(gap, third / (6 * temperature**2), atol=20 / temperature**3, rtol=0)


@given(scores(), st.floats(0.3, 5))
def test_gaussian_entropic_is_the_closed_form_of_its_expectation(table, temperature):
    """Gauss-Hermite quadrature of E exp(-r / b), exact for these Gaussians."""
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(80))
    rewards = table.mean[..., None] + table.std[..., None] * nodes
    expectation = ((-rewards / temperature).exp() * weights).sum(-1) / weights.sum()
    expected = -temperature * expectation.mean(1).log()
    torch.testing.assert_close(gaussian_entropic_reward(table, temperature), expected, atol=1e-6, rtol=1e-6)


@given(scores(min_heads=2), WEIGHTS, CREDIBLE)
def test_the_minimum_per_batch_is_kinder_than_the_minimum_per_response(table, weight, credible):
    per_batch = batch_robust_reward(table, weight, credible)
    assert (robust_reward(table, weight, credible) <= per_batch + 1e-12).all()
    worst = (table.mean - credible * table.std).mean(0).min()
    expected = weight * nominal_reward(table).mean() + (1 - weight) * worst
    torch.testing.assert_close(per_batch.mean(), expected)


@st.composite
def posterior_scores(draw):
    """Scores whose standard deviations are the lengths of offsets, in one space for all heads or in one for each."""
    batch, heads, inner = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mean = torch.randn(batch, heads, generator=generator, dtype=torch.float64)
    spaces = draw(st.sampled_from([1, heads]))
    offset = torch.randn(batch, spaces, inner, generator=generator, dtype=torch.float64)
    return Scores(mean, offset.norm(dim=2).expand_as(mean), offset)


def slow_ellipsoid(table, credible):
    """The least over heads of mu - credible z . u, u the unit vector along the batch's mean z in that head's space."""
    found = []
    for mean, offsets in zip(table.mean.numpy(), table.offset.numpy(), strict=True):
        rewards = []
        for head, reward in enumerate(mean):
            space = head % table.offset.shape[1]
            centre = table.offset[:, space].numpy().mean(0)
            rewards.append(reward - credible * offsets[space] @ centre / math.sqrt(centre @ centre))
        found.append(min(rewards))
    return found


@given(posterior_scores(), CREDIBLE)
def test_the_ellipsoid_equals_the_loop_over_responses_and_heads(table, credible):
    assert ellipsoid_reward(table, credible).tolist() == pytest.approx(slow_ellipsoid(table, credible), abs=1e-9)


def test_the_ellipsoid_needs_a_posterior_and_a_batch_in_the_middle_of_it_costs_nothing():
    with pytest.raises(ValueError, match=r"needs ensemble\.sigma posterior"):
        ellipsoid_reward(Scores(torch.zeros(1, 1), torch.ones(1, 1)), 1.0)
    middle = Scores(torch.ones(2, 1), torch.ones(2, 1), torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]]))
    assert ellipsoid_reward(middle, 2.0).tolist() == [1.0, 1.0]


def test_what_is_done_to_scores_is_done_to_all_of_them():
    table = Scores(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]), torch.tensor([[[5.0]], [[6.0]]]))
    assert [part.flatten().tolist() for part in table.each(torch.neg)] == [[-1, -2], [-3, -4], [-5, -6]]
    assert [part.flatten().tolist() for part in table.of([1])] == [[2], [4], [6]]
    assert table._replace(offset=None).each(torch.neg).offset is None
    assert [part if part is None else part.tolist() for part in certain(table)] == [[[1], [2]], [[0], [0]], None]
