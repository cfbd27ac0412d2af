"""Best of n by proxy: against all subsets, exact fractions, and a simulation of the selection itself."""

import math
from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rrlhf.policy.selection import best_of_n_curve, best_of_n_kl, best_of_n_weights, chosen

proxies = st.lists(st.integers(-3, 3), min_size=1, max_size=7)  # few values: ties are common


def by_subsets(proxy, values, n):
    """The mean, over all subsets of n, of the value of the best one; of equally good ones, of their mean."""
    bests = []
    for subset in combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        tied = [values[i] for i in subset if proxy[i] == top]
        bests.append(Fraction(sum(tied), len(tied)))
    return float(sum(bests) / len(bests))


@settings(deadline=None)
@given(proxies, st.data())
def test_the_curve_is_the_mean_over_all_subsets(proxy, data):
    values = data.draw(st.lists(st.integers(-50, 50), min_size=len(proxy), max_size=len(proxy)))
    curve = best_of_n_curve(torch.tensor(proxy).double(), torch.tensor(values).double(), len(proxy))
    expected = [by_subsets(proxy, values, n) for n in range(1, len(proxy) + 1)]
    torch.testing.assert_close(curve, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=1e-12)


@settings(deadline=None)
@given(st.permutations(range(6)))
def test_the_order_of_samples_does_not_matter(order):
    proxy = torch.tensor([1.0, 2.0, 2.0, 0.0, 5.0, 2.0])
    values = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0, 9.0])
    order = torch.tensor(order)
    torch.testing.assert_close(
        best_of_n_curve(proxy[order], values[order], 6), best_of_n_curve(proxy, values, 6), atol=1e-12, rtol=0
    )


def test_many_prompts_at_once_are_each_prompt_alone():
    torch.manual_seed(0)
    proxy, values = torch.randn(4, 3, 20).round(decimals=1), torch.randn(4, 3, 20)
    together = best_of_n_curve(proxy, values, 9)
    assert together.shape == (4, 3, 9)
    torch.testing.assert_close(together[2, 1], best_of_n_curve(proxy[2, 1], values[2, 1], 9), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("samples", "n"), [(9, 4), (2000, 2), (2000, 512), (2000, 2000)])
def test_weights_are_the_fractions_that_they_stand_for(samples, n):
    weights = best_of_n_weights(samples, n)[n - 1]
    for rank in {1, n - 1 or 1, n, (n + samples) // 2, samples}:
        exact = Fraction(math.comb(rank - 1, n - 1), math.comb(samples, n))
        assert weights[rank - 1].item() == pytest.approx(float(exact), rel=1e-11, abs=1e-290)
    assert weights.sum().item() == pytest.approx(1, abs=1e-11)


def test_the_estimate_is_unbiased():
    torch.manual_seed(1)
    quality, noise = torch.randn(200_000, 8), torch.randn(200_000, 8)
    proxy = quality + noise
    from_all = best_of_n_curve(proxy, quality, 4)
    first_four = quality[:, :4].gather(1, chosen(proxy[:, :4])[:, None])[:, 0]  # what choosing really gives
    assert from_all[:, 3].mean().item() == pytest.approx(first_four.mean().item(), abs=0.01)
    assert from_all[:, 3].var() < first_four.var()  # and it uses the samples better


def test_the_best_by_itself_rises_and_the_best_of_one_is_the_mean():
    torch.manual_seed(2)
    proxy = torch.randn(50)
    curve = best_of_n_curve(proxy, proxy, 50)
    assert (curve.diff() > 0).all()
    assert curve[0].item() == pytest.approx(proxy.double().mean().item(), abs=1e-12)
    assert curve[-1].item() == pytest.approx(proxy.max().item(), abs=1e-12)


def test_equal_proxies_choose_nothing():
    values = torch.tensor([1.0, 5.0, 9.0])
    torch.testing.assert_close(best_of_n_curve(torch.zeros(3), values, 3), torch.full((3,), 5.0).double())
    assert chosen(torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])).tolist() == [1, 0]


@pytest.mark.parametrize("n_max", [0, 4])
def test_more_than_there_is_cannot_be_told(n_max):
    with pytest.raises(ValueError, match="n is 1 to 3"):
        best_of_n_curve(torch.zeros(3), torch.zeros(3), n_max)


def test_the_kl_is_exact_without_ties_and_a_bound_with_few_responses():
    """Best of n among k equally likely responses: the one of rank r is best with P = (r/k)^n - ((r-1)/k)^n."""

    def kl(k, n):
        shares = [(r / k) ** n - ((r - 1) / k) ** n for r in range(1, k + 1)]
        return sum(p * math.log(p * k) for p in shares if p > 0)

    assert best_of_n_kl(1) == 0
    for n in (2, 5, 16):
        assert kl(100_000, n) == pytest.approx(best_of_n_kl(n), abs=1e-3)
        assert kl(3, n) < best_of_n_kl(n)
