"""The Laplace posterior of a Bradley-Terry head: against slow versions of it, closed forms, and what it must mean."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from rrlhf.rewards.heads import Pairs, RewardHeads
from rrlhf.rewards.posterior import fit, whiten
from rrlhf.robust import AGGREGATIONS, difference_std


def labelled(seed, pairs, width, strength=1.0):
    """Draw differences of features, turned as a person with a linear reward would label them, with noise."""
    draw = torch.Generator().manual_seed(seed)
    d = torch.randn(pairs, width, generator=draw, dtype=torch.float64)
    wins = torch.rand(pairs, generator=draw) < torch.sigmoid(strength * d.sum(1))
    return torch.where(wins[:, None], d, -d)


def slow_objective(d, theta, precision):
    """Return the negative log posterior with its constant, a pair and a coordinate at a time."""
    likelihood = sum(math.log1p(math.exp(-sum(a * b for a, b in zip(row, theta, strict=True)))) for row in d.tolist())
    prior = sum(0.5 * precision * each**2 - 0.5 * math.log(precision / (2 * math.pi)) for each in theta)
    return likelihood + prior


def slow_posterior(d, precision):
    """Return mode, precision matrix and log evidence with another optimiser and a numerical curvature."""
    width, step = d.shape[1], 1e-4
    found = minimize(lambda theta: slow_objective(d, theta, precision), [0.0] * width, method="BFGS", tol=1e-9)
    mode = found.x

    def moved(i, a, j, b):
        theta = mode.copy()
        theta[i] += a * step
        theta[j] += b * step
        return slow_objective(d, theta, precision)

    curvature = torch.tensor(
        [
            [
                (moved(i, 1, j, 1) - moved(i, 1, j, -1) - moved(i, -1, j, 1) + moved(i, -1, j, -1)) / (4 * step**2)
                for j in range(width)
            ]
            for i in range(width)
        ],
        dtype=torch.float64,
    )
    evidence = -found.fun + 0.5 * width * math.log(2 * math.pi) - 0.5 * float(torch.logdet(curvature))
    return torch.tensor(mode), curvature, evidence


def sigma(posterior, offsets):
    return whiten(posterior.factor, offsets).norm(dim=1)


@pytest.mark.parametrize(("seed", "pairs", "width", "precision"), [(0, 30, 3, 0.5), (1, 12, 4, 5.0), (2, 60, 2, 0.01)])
def test_it_equals_the_slow_version(seed, pairs, width, precision):
    d = labelled(seed, pairs, width)
    mode, curvature, evidence = slow_posterior(d, precision)
    found = fit(d, precision)
    torch.testing.assert_close(found.mode, mode, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.factor @ found.factor.T, curvature, atol=1e-3, rtol=1e-3)
    assert found.log_evidence == pytest.approx(evidence, abs=1e-3)
    x = torch.randn(5, width, dtype=torch.float64)
    expected = (x @ torch.linalg.inv(curvature) * x).sum(1).sqrt()
    torch.testing.assert_close(sigma(found, x), expected, rtol=1e-3, atol=0)


def test_with_many_pairs_it_is_the_posterior_itself():
    d, precision = labelled(3, 400, 2), 1.0
    side = torch.linspace(-3, 5, 400, dtype=torch.float64)
    theta = torch.cartesian_prod(side, side)
    log = torch.nn.functional.logsigmoid(theta @ d.T).sum(1) - 0.5 * precision * theta.square().sum(1)
    weight = (log - log.max()).exp() / (log - log.max()).exp().sum()
    for x in torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0]], dtype=torch.float64):
        reward = theta @ x
        mean = (weight * reward).sum()
        exact = (weight * (reward - mean) ** 2).sum().sqrt()
        assert sigma(fit(d, precision), x[None]).item() == pytest.approx(exact.item(), rel=0.06)


def test_without_pairs_it_is_the_prior():
    found = fit(torch.zeros(0, 3), 4.0)
    assert found.mode.tolist() == [0, 0, 0]
    torch.testing.assert_close(found.factor, 2 * torch.eye(3, dtype=torch.float64))
    assert found.log_evidence == pytest.approx(0)
    assert sigma(found, torch.tensor([[0.0, 3.0, 4.0]]).double()).item() == pytest.approx(2.5)


@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_pairs_seen_twice_halve_the_variance(seed, precision):
    d = labelled(seed, 20, 3)
    once, twice = fit(d, precision), fit(torch.cat([d, d]), 2 * precision)
    x = labelled(seed + 1, 4, 3)
    torch.testing.assert_close(twice.mode, once.mode, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sigma(twice, x) ** 2, sigma(once, x) ** 2 / 2, atol=0, rtol=1e-6)


@settings(max_examples=10)
@given(st.integers(0, 10_000))
def test_the_precision_has_the_greatest_evidence_of_all(seed):
    d = labelled(seed, 40, 5)
    best = fit(d)
    others = [fit(d, 10.0**power).log_evidence for power in torch.linspace(-2, 7, 40).tolist()]
    assert best.log_evidence >= max(others) - 1e-3


def test_single_precision_is_enough_to_read_it():
    d, x = labelled(5, 50, 8), labelled(6, 10, 8)
    found = fit(d)
    torch.testing.assert_close(
        whiten(found.factor.float(), x.float()).norm(dim=1).double(), sigma(found, x), rtol=1e-5, atol=0
    )


SHAPES = {  # heads with their features: a width, heads, hidden units, and whether every head has a trunk of its own
    "linear": (6, 3, 0, False),
    "hidden": (6, 3, 5, False),
    "trunks": (6, 3, 0, True),
    "hidden on trunks": (6, 3, 5, True),
}


@pytest.fixture(params=SHAPES)
def known(request):
    """Heads of every shape that know their posterior, and the features that they read."""
    width, count, hidden, own = SHAPES[request.param]
    draw = torch.Generator().manual_seed(7)
    rows = (40, count, width) if own else (40, width)
    one, other, reference = (torch.randn(rows, generator=draw) for _ in range(3))
    better = (one - other).flatten(1).sum(1) > 0
    keep = better.view(-1, *[1] * (one.dim() - 1))
    pairs = Pairs(torch.where(keep, one, other), torch.where(keep, other, one))
    torch.manual_seed(7)
    heads = RewardHeads(width, count, hidden, 0.05).eval()
    heads.standardise(torch.cat(pairs))
    heads.normalise(reference)
    heads.know(pairs, reference)
    return heads, pairs, reference


def test_a_space_of_states_has_one_posterior(known):
    heads, _, reference = known
    scores = heads.score(reference)
    spaces = 1 if heads.shape["hidden"] == 0 and reference.dim() == 2 else 3
    assert len(heads.factor) == len(heads.origin) == len(heads.precision) == spaces
    assert (scores.std == scores.std[:, :1]).all() == (spaces == 1)


@torch.no_grad()
def test_sigma_is_that_of_the_reward_less_the_references(known):
    heads, pairs, reference = known
    scores = heads.score(pairs.chosen)
    states, known_states = (
        heads.states(side).view(len(side), len(heads.factor), -1).double() for side in (pairs.chosen, reference)
    )
    differences = (heads.states(pairs.chosen) - heads.states(pairs.rejected)).view(
        len(pairs.chosen), len(heads.factor), -1
    )
    for space in range(len(heads.factor)):
        found = fit(differences[:, space])
        unit = (known_states[:, space] @ found.mode).std()
        covariance = torch.linalg.inv(found.factor @ found.factor.T) / unit**2
        offset = states[:, space] - known_states[:, space].mean(0)
        expected = (offset @ covariance * offset).sum(1).sqrt()
        torch.testing.assert_close(scores.std[:, space].double(), expected, rtol=1e-3, atol=1e-5)
        assert heads.precision[space].item() == pytest.approx(found.precision, rel=1e-4)


def test_the_difference_of_a_response_to_itself_is_known(known):
    heads, pairs, _ = known
    one, other = heads.score(pairs.chosen), heads.score(pairs.rejected)
    assert difference_std(one, one).abs().max() == 0
    assert (difference_std(one, other) <= one.std + other.std + 1e-5).all()


def test_an_added_constant_changes_nothing():
    draw = torch.Generator().manual_seed(8)
    pairs, reference = (
        Pairs(*(torch.randn(30, 4, generator=draw) for _ in range(2))),
        torch.randn(30, 4, generator=draw),
    )

    def stds(shift):
        torch.manual_seed(8)
        heads = RewardHeads(4, 1, 0, 0.05)
        heads.standardise(torch.cat(pairs))
        heads.normalise(reference + shift)
        heads.know(Pairs(pairs.chosen + shift, pairs.rejected + shift), reference + shift)
        return heads.score(pairs.chosen + shift).std

    torch.testing.assert_close(stds(torch.tensor([3.0, -1.0, 0.0, 9.0])), stds(torch.zeros(4)), rtol=1e-4, atol=1e-5)


def test_it_grows_with_the_distance_and_most_where_no_pair_points():
    d = torch.zeros(200, 2)
    d[:, 0] = labelled(9, 200, 1)[:, 0]
    pairs, reference = Pairs(d / 2, -d / 2), torch.randn(50, 2, generator=torch.Generator().manual_seed(10))
    torch.manual_seed(9)
    heads = RewardHeads(2, 1, 0, 0.05)
    heads.feature_std = torch.ones(2)
    heads.normalise(reference)
    heads.know(pairs, reference)
    away = torch.tensor([[0.0, 1.0], [0.0, 10.0], [10.0, 0.0]]) + reference.mean(0)
    std = heads.score(away).std[:, 0]
    assert std[1].item() == pytest.approx(10 * std[0].item(), rel=1e-4)
    assert std[1] > 3 * std[2]


def test_what_was_saved_scores_the_same(known, tmp_path):
    heads, pairs, _ = known
    heads.save(tmp_path)
    for before, after in zip(heads.score(pairs.chosen), RewardHeads.load(tmp_path).score(pairs.chosen), strict=True):
        assert torch.equal(before, after)


def test_the_ellipsoids_weights_are_the_worst_for_the_batch(known):
    heads, pairs, _ = known
    scores, credible = heads.score(pairs.chosen), 1.5
    found = AGGREGATIONS["ellipsoid"](scores, credible=credible)
    assert (found >= AGGREGATIONS["worst"](scores, credible=credible) - 1e-5).all()
    # Any other weights of the ellipsoid leave the batch more: theta = mode - credible * L'^-1 u for a unit vector u.
    draw = torch.Generator().manual_seed(11)
    for _ in range(50):
        u = torch.nn.functional.normalize(torch.randn(scores.offset.shape[1:], generator=draw), dim=1)
        other = scores.mean - credible * (scores.offset * u).sum(2)
        lowest = scores.mean.mean(0) - credible * scores.offset.mean(0).norm(dim=1)
        assert (other.mean(0) >= lowest - 1e-5).all()
    if scores.mean.shape[1] == 1:
        assert found.mean().item() == pytest.approx(lowest.item(), abs=1e-5)
