import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import norm, spearmanr
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from rrlhf.judging.calibration import (
    area_under_curve,
    brier_score,
    correct,
    estimate,
    expected_calibration_error,
    fitted_temperature,
    head_correlation,
    maximum_calibration_error,
    negative_log_likelihood,
    rank_correlation,
    reliability,
    share_interval,
    wilson_interval,
    within_central_interval,
)
from rrlhf.judging.content import Measured


def test_standard_error_of_a_small_sample_by_hand():
    found = estimate(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert found.mean == 2.5
    assert found.stderr == pytest.approx((5 / 3) ** 0.5 / 2)


def test_rows_of_one_prompt_count_as_one_unit():
    grouped = estimate(torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0]), torch.tensor([7, 7, 3, 3, 3, 3]))
    assert grouped == estimate(torch.tensor([1.0, 0.0]))


def test_a_tie_is_half_correct():
    assert correct(torch.tensor([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]


def test_probabilities_that_come_true_as_often_as_they_say_have_no_error():
    probability = torch.tensor([0.8] * 10)
    probability[:2] = 0.2  # seen from the likelier side: 8 of 10 right at confidence 0.8
    assert expected_calibration_error(probability) == pytest.approx(0, abs=1e-7)


def test_a_model_that_is_sure_and_half_right_is_off_by_half():
    assert expected_calibration_error(torch.tensor([1.0, 0.0])) == pytest.approx(0.5)


# No probability whose confidence is the edge of a bin: rounding would decide which bin the loop puts it in.
OFF_THE_EDGES = (
    st.integers(1, 99).filter(lambda percent: percent == 50 or percent % 5).map(lambda percent: percent / 100)
)


@given(st.lists(OFF_THE_EDGES, min_size=1, max_size=60))
def test_ece_equals_the_loop_over_bins(numbers):
    probability = torch.tensor(numbers)
    confidence = [max(p, 1 - p) for p in probability.double().tolist()]
    hits = [1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0 for p in probability.tolist()]
    total = 0.0
    for b in range(10):
        inside = [i for i, c in enumerate(confidence) if min(int((c - 0.5) * 20), 9) == b]
        total += abs(sum(hits[i] for i in inside) - sum(confidence[i] for i in inside))
    assert expected_calibration_error(probability) == pytest.approx(total / len(numbers), abs=1e-6)


LOG_ODDS = st.lists(st.integers(-80, 80).map(lambda tenths: tenths / 10), min_size=2, max_size=60).map(torch.tensor)


@given(LOG_ODDS)
def test_brier_and_likelihood_agree_with_scikit_learn_from_either_side(log_odds):
    """A pair read from the other side, outcome 0 and probability 1 - p, is the same pair."""
    p = log_odds.double().sigmoid().numpy()
    outcome = np.ones(len(p))
    outcome[::2] = 0
    sided = np.where(outcome == 1, p, 1 - p)
    assert brier_score(log_odds.double().sigmoid()) == pytest.approx(brier_score_loss(outcome, sided, pos_label=1))
    assert negative_log_likelihood(log_odds) == pytest.approx(log_loss(outcome, sided, labels=[0, 1]), abs=1e-9)


def test_certain_mistakes_cost_finite_likelihood():
    assert negative_log_likelihood(torch.tensor([-200.0, 200.0])) == pytest.approx(100.0)


@given(st.lists(OFF_THE_EDGES.filter(lambda p: p != 0.5), min_size=1, max_size=60))
def test_the_reliability_table_agrees_with_scikit_learn(numbers):
    probability = torch.tensor(numbers, dtype=torch.float64)
    hit = (probability > 0.5).numpy()
    confidence = torch.maximum(probability, 1 - probability).numpy()
    accuracy, stated = calibration_curve(hit, (confidence - 0.5) * 2, n_bins=10)
    found = reliability(probability)
    assert [row.accuracy for row in found] == pytest.approx(list(accuracy))
    assert [row.confidence for row in found] == pytest.approx(list(stated / 2 + 0.5))
    assert sum(row.n for row in found) == len(numbers)
    assert maximum_calibration_error(probability) == pytest.approx(np.abs(accuracy - stated / 2 - 0.5).max())
    assert all(row.low <= row.accuracy <= row.high for row in found)


@given(st.floats(0.2, 5.0), st.integers(0, 2**31))
def test_the_temperature_minimises_the_loss(scale, seed):
    log_odds = torch.randn(200, generator=torch.Generator().manual_seed(seed)).double() * scale + 0.3 * scale
    found = minimize_scalar(
        lambda inverse: negative_log_likelihood(log_odds * inverse), bounds=(1e-6, 200), options={"xatol": 1e-9}
    )
    assert 1 / fitted_temperature(log_odds) == pytest.approx(found.x, rel=1e-4, abs=1e-4)


def test_the_temperature_undoes_what_log_odds_were_multiplied_by():
    true = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).double() * 2
    chosen_won = torch.rand(len(true), generator=torch.Generator().manual_seed(1)).double() < true.sigmoid()
    seen = torch.where(chosen_won, true, -true)
    assert fitted_temperature(seen) == pytest.approx(1, abs=0.02)
    assert fitted_temperature(3 * seen) == pytest.approx(3 * fitted_temperature(seen))


def test_there_is_no_finite_temperature_for_perfect_or_chance_orders():
    for margins in ([0.1, 2.0], [1.0, -1.0], [1.0, -3.0]):
        assert fitted_temperature(torch.tensor(margins)) is None


@given(st.floats(0, 1), st.floats(0.5, 1e6), st.floats(0.5, 0.999))
@example(1.0, 15, 0.95)
def test_a_wilson_interval_holds_its_share(share, n, level):
    low, high = wilson_interval(share, n, level)
    assert 0 <= low <= share <= high <= 1


def test_wilson_by_hand_and_its_use_of_the_standard_error():
    low, high = wilson_interval(0.5, 100)
    assert (low, high) == (pytest.approx(0.403832, abs=1e-6), pytest.approx(0.596168, abs=1e-6))
    assert share_interval(Measured(0.5, 0.05, 400)) == wilson_interval(0.5, 100)  # .25 / .05^2 rows
    assert share_interval(Measured(1.0, 0.0, 8)) == wilson_interval(1.0, 8)
    assert share_interval(Measured(0.5, math.nan, 1)) == wilson_interval(0.5, 1)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95])
def test_honest_gaussians_are_covered_as_often_as_they_say(level):
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(100_000, generator=generator), torch.rand(100_000, generator=generator) + 0.1
    target = mean + std * torch.randn(100_000, generator=generator)
    inside = within_central_interval(mean, std, target, level)
    assert inside.mean().item() == pytest.approx(level, abs=0.006)
    low, high = norm.interval(level, mean[:50].numpy(), std[:50].numpy())
    assert inside[:50].tolist() == ((low <= target[:50].numpy()) & (target[:50].numpy() <= high)).tolist()


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=40))
def test_rank_correlation_agrees_with_scipy_with_ties(rows):
    one, other = torch.tensor(rows).double().T
    found = rank_correlation(one, other)
    if len(one.unique()) == 1 or len(other.unique()) == 1:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(one, other).statistic, abs=1e-9)


def test_head_correlation_agrees_with_numpy():
    mean = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert head_correlation(mean).numpy() == pytest.approx(np.corrcoef(mean.double().numpy().T))
    assert head_correlation(mean[:, :1]).tolist() == [[pytest.approx(1.0)]]


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=40))
def test_the_area_under_the_curve_is_sklearns(rows):
    values, positive = torch.tensor([value for value, _ in rows]), torch.tensor([is_one for _, is_one in rows])
    found = area_under_curve(values, positive)
    if positive.all() or not positive.any():
        assert found is None
    else:
        assert found == pytest.approx(roc_auc_score(positive.numpy(), values.numpy()))
