import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rrlhf.calibration import correct, estimate, expected_calibration_error


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
