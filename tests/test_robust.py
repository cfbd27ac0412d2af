import torch
from hypothesis import given
from hypothesis import strategies as st

from rrlhf.robust import (
    Scores,
    head_spread,
    mean_reward,
    most_confident,
    nominal_reward,
    robust_reward,
    worst_reward,
)

WEIGHTS = st.floats(0, 1)


@st.composite
def scores(draw, min_heads=1):
    batch, heads = draw(st.integers(1, 6)), draw(st.integers(min_heads, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mean = torch.randn(batch, heads, generator=generator, dtype=torch.float64)
    return Scores(mean, torch.rand(batch, heads, generator=generator, dtype=torch.float64) + 0.01)


def test_the_mixture_of_a_small_table_by_hand():
    table = Scores(torch.tensor([[1.0, 3.0, -1.0], [0.5, 0.2, 0.9]]), torch.tensor([[0.3, 0.1, 0.2], [0.1, 0.2, 0.3]]))
    assert most_confident(table).tolist() == [1, 0]
    assert nominal_reward(table).tolist() == [3.0, 0.5]
    assert worst_reward(table).tolist() == [-1.0, torch.tensor(0.2).item()]
    expected = torch.tensor([0.4 * 3.0 + 0.6 * -1.0, 0.4 * 0.5 + 0.6 * 0.2])
    torch.testing.assert_close(robust_reward(table, 0.4), expected)


@given(scores(), WEIGHTS)
def test_worst_is_never_above_robust_and_robust_never_above_nominal(table, weight):
    robust = robust_reward(table, weight)
    assert (worst_reward(table) <= robust + 1e-12).all()
    assert (robust <= nominal_reward(table) + 1e-12).all()
    assert (worst_reward(table) <= mean_reward(table) + 1e-12).all()


@given(scores())
def test_the_ends_of_the_weight_are_the_nominal_and_the_worst_reward(table):
    torch.testing.assert_close(robust_reward(table, 1.0), nominal_reward(table))
    torch.testing.assert_close(robust_reward(table, 0.0), worst_reward(table))


@given(scores(), WEIGHTS, st.randoms())
def test_the_order_of_heads_does_not_matter(table, weight, random):
    order = list(range(table.mean.shape[1]))
    random.shuffle(order)
    shuffled = Scores(table.mean[:, order], table.std[:, order])
    torch.testing.assert_close(robust_reward(shuffled, weight), robust_reward(table, weight))


@given(scores(), WEIGHTS, st.floats(-5, 5), st.floats(0.1, 10))
def test_shift_and_scale_of_all_heads_pass_through(table, weight, shift, scale):
    moved = Scores(table.mean * scale + shift, table.std * scale)
    torch.testing.assert_close(robust_reward(moved, weight), robust_reward(table, weight) * scale + shift)
    torch.testing.assert_close(head_spread(moved), head_spread(table) * scale)


@given(scores(), WEIGHTS)
def test_one_head_is_its_own_robust_reward(table, weight):
    one = Scores(table.mean[:, :1], table.std[:, :1])
    torch.testing.assert_close(robust_reward(one, weight), one.mean[:, 0])


@given(scores(min_heads=2))
def test_the_mean_of_minima_is_at_most_the_minimum_of_means(table):
    assert worst_reward(table).mean() <= table.mean.mean(0).min() + 1e-12
