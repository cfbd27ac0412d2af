"""Excerpts show the same prompts over a training, and are not chosen for what they say."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrlhf.policy.excerpts import FILE, PROMPTS, RolloutResponse, excerpts, read_excerpts, write_excerpts

ASKED = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Say {n}."}] for n in range(50)]


def kept(*asked):
    """Responses of rollouts that asked the prompts of these rows."""
    return [
        RolloutResponse(update, row, f"{update}:{i}", True, 0.5, 1.0, [0.1, 0.2], 0.3)
        for update, rows in enumerate(asked)
        for i, row in enumerate(rows)
    ]


def shown(responses):
    return [(row.row, row.update) for row in excerpts(responses, ASKED)]


def test_a_prompt_is_shown_at_its_first_middle_and_last_rollout():
    assert shown(kept([0, 1], [0, 2], [3, 0], [0, 4], [0, 5])) == [(0, 0), (0, 2), (0, 4)]


def test_prompts_that_came_up_often_enough_go_first():
    assert shown(kept([7, 8], [7, 8], [8, 9])) == [(8, 0), (8, 1), (8, 2), (7, 0), (7, 1)]


def test_only_the_first_of_several_responses_to_a_prompt_is_shown():
    assert [row.response for row in excerpts(kept([3, 3], [3, 3]), ASKED)] == ["0:0", "1:0"]


def test_prompts_that_come_up_once_are_shown_from_three_rollouts():
    assert shown(kept([0, 1], [2, 3], [4, 5], [6, 7], [8, 9])) == [(0, 0), (4, 2), (8, 4)]


def test_the_prompt_is_what_was_asked_last():
    assert excerpts(kept([4]), ASKED)[0].prompt == "Say 4."


@given(st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=6), max_size=12))
def test_excerpts_are_few_and_were_all_written(asked):
    responses = kept(*asked)
    found = excerpts(responses, ASKED)
    assert len(found) <= 3 * PROMPTS
    assert bool(found) == bool(responses)
    written = {(row.update, row.prompt, row.response) for row in responses}
    assert {(row.update, row.row, row.response) for row in found} <= written
    order = list(dict.fromkeys(row.row for row in found))
    assert [row.row for row in found] == sorted((row.row for row in found), key=order.index)  # side by side


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_none_so_that_any_reader_reads_it(tmp_path, value):
    found = excerpts([RolloutResponse(0, 1, "a", False, value, value, [value, 0.5], 0.3)], ASKED)
    write_excerpts(found, tmp_path)
    [row] = read_excerpts(tmp_path)
    assert "NaN" not in (tmp_path / FILE).read_text()
    assert "Infinity" not in (tmp_path / FILE).read_text()
    assert (row.kl, row.proxy, row.heads) == (None, None, [None, 0.5])


def test_a_policy_without_rollouts_has_none(tmp_path):
    assert read_excerpts(tmp_path) == []
