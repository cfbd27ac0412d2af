"""Gates: win rates per prompt, the worse end of intervals, and what is asked of an alias."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rrlhf.config import Gates
from rrlhf.judging.calibration import group_means, mean_interval
from rrlhf.judging.content import Measured
from rrlhf.pipeline.tracking.tracker import Version
from rrlhf.policy.reading import Judges, Reading, wins_over
from rrlhf.robust import Scores
from rrlhf.tools.gates import Read, at_most, clean, gates, in_words, win_rate, wins, within
from rrlhf.tools.promote import check, named

LIMITS = {"min_win_rate": 0.5, "max_kl": 5.0, "max_sigma": 0.3, "max_length_drift": 0.5, "max_repetition": 0.1}


def read(judged, kl=1.0, sigma=0.2, words=10.0, repetition=0.05):
    judged = torch.as_tensor(judged, dtype=torch.float64)
    return Read(judged, *(torch.full_like(judged, value) for value in (kl, sigma, words, repetition)))


def slow_wins(mine, theirs):
    shares = []
    for own, other in zip(mine.tolist(), theirs.tolist(), strict=True):
        met = [(a > b) + 0.5 * (a == b) for a in own for b in other]
        shares.append(sum(met) / len(met))
    return shares


scores = st.integers(1, 4).flatmap(
    lambda samples: st.lists(st.lists(st.integers(-2, 2), min_size=samples, max_size=samples), min_size=1, max_size=6)
)


@given(scores, st.randoms())
def test_wins_are_those_of_all_pairs_of_a_prompts_responses(mine, draw):
    own = torch.tensor(mine, dtype=torch.float64)
    other = torch.tensor([[draw.randint(-2, 2) for _ in row] for row in mine], dtype=torch.float64)
    assert wins(own, other).tolist() == pytest.approx(slow_wins(own, other), abs=1e-12)
    assert (wins(own, other) + wins(other, own)).tolist() == pytest.approx([1.0] * len(mine), abs=1e-12)


def test_a_version_against_itself_is_not_better():
    judged = torch.randn(50, 2, generator=torch.manual_seed(0))
    gate = win_rate(wins(judged, judged), 0.5, 0.95)
    assert gate["value"] == pytest.approx(0.5)
    assert not gate["passed"]


def test_a_version_that_wins_everywhere_passes_and_loses_nowhere_it_needs_not():
    judged = torch.randn(50, 2, generator=torch.manual_seed(0))
    assert win_rate(wins(judged + 9, judged), 0.9, 0.95)["passed"]
    assert not win_rate(wins(judged - 9, judged), 0.1, 0.95)["passed"]


def test_a_single_prompt_passes_nothing():
    one = torch.ones(1, 2)
    assert not win_rate(wins(one, one - 1), 0.0, 0.95)["passed"]
    gate = at_most("kl", torch.zeros(1), 5.0, 0.95)
    assert not gate["passed"]
    assert gate["low"] is None


def test_a_judge_without_any_verdict_passes_nothing():
    gate = win_rate(group_means(torch.empty(0), torch.empty(0)), 0.0, 0.95)
    assert (gate["passed"], gate["value"], gate["low"], gate["n"]) == (False, None, None, 0)
    assert in_words(gate) == gate["rule"]


def test_the_interval_of_a_mean_is_students():
    values = torch.tensor([1.0, 2.0, 4.0, 7.0])
    low, high = mean_interval(Measured(3.5, values.std().item() / 2, 4), 0.9)
    expected = stats.t.interval(0.9, 3, loc=3.5, scale=stats.sem(values.numpy()))
    assert (low, high) == pytest.approx(expected, rel=1e-9)
    assert all(math.isnan(bound) for bound in mean_interval(Measured(1.0, math.nan, 1)))


def test_the_upper_end_decides_not_the_mean():
    values = torch.tensor([0.0, 0.0, 0.0, 8.0])
    assert not at_most("kl", values, 5.0, 0.95)["passed"]
    assert at_most("kl", values, 5.0, 0.5)["passed"]


def test_drift_counts_on_either_side():
    for drift in (-0.6, 0.6):
        assert not within("length", torch.full((9,), drift), 0.5, 0.95)["passed"]
    assert within("length", torch.full((9,), -0.4), 0.5, 0.95)["passed"]


@pytest.mark.parametrize(
    ("failed", "bad"),
    [
        ("win_rate", {}),
        ("kl", {"kl": 6.0}),
        ("sigma", {"sigma": 0.6}),
        ("length", {"words": 4.0}),
        ("length", {"words": 16.0}),
        ("repetition", {"repetition": 0.3}),
    ],
)
def test_every_gate_fails_for_its_own_reason_alone(failed, bad):
    start = read(torch.zeros(30, 2))
    candidate = read(torch.full((30, 2), -1.0 if failed == "win_rate" else 1.0), **bad)
    found = gates(candidate, wins(candidate.judged, start.judged), start, Gates(level=0.95, **LIMITS))
    assert [gate["name"] for gate in found if not gate["passed"]] == [failed]


def test_a_gate_without_a_limit_is_not_asked():
    start = read(torch.zeros(30, 2))
    assert gates(start, torch.zeros(30), start, Gates(level=0.95, **dict.fromkeys(LIMITS))) == []


def test_the_audit_passes_only_when_it_found_nothing():
    assert clean([])["passed"]
    assert not clean(["sft of ppo-robust: gone"])["passed"]
    assert "gone" in in_words(clean(["sft of ppo-robust: gone"]))


@pytest.mark.parametrize("to", ["latest", "candidate", "robust", "No", "", "a b", "v2"])
def test_an_alias_that_runs_move_or_that_is_none_is_refused(to):
    with pytest.raises(ValueError, match="--to"):
        check(to, None, ["single", "robust"])


def test_an_override_needs_a_reason():
    with pytest.raises(ValueError, match="reason"):
        check("champion", " ", [])
    check("champion", "wanted", [])


@pytest.mark.parametrize(
    ("reference", "meant"),
    [
        ("rrlhf-tiny-policy@candidate", "rrlhf-tiny-policy/1"),
        ("rrlhf-policy@candidate", "rrlhf-policy/7"),
        ("rrlhf-tiny-policy@latest", "rrlhf-tiny-policy/1"),
        ("rrlhf-policy/7", "rrlhf-policy/7"),
        ("ab" * 4, "rrlhf-policy/7"),
    ],
)
def test_of_the_names_that_one_policy_has_the_one_that_was_asked_for_is_promoted(reference, meant):
    made = {"stage": "ppo", "digest": "ab" * 32, "inputs": {}, "input_keys": {}, "git_commit": None}
    tags = {"rrlhf.key": "cd" * 32, "rrlhf.node": "ppo-robust", "rrlhf.made": json.dumps(made)}
    names = [("rrlhf-tiny-policy", "1"), ("rrlhf-policy", "7")]
    versions = [Version(name, number, ("candidate",), tags) for name, number in names]
    found = named(reference, "default", versions)
    assert f"{found.name}/{found.version}" == meant


def test_by_a_judge_that_scores_the_first_response_to_a_prompt_meets_the_first_of_theirs():
    def reading(own, per_prompt):
        texts, none = ["said"] * len(own), torch.zeros(len(own))
        scores = Scores(none[:, None], none[:, None])
        return Reading(texts, [True] * len(own), none, none, scores, {}, None, {}, per_prompt, torch.tensor(own))

    nobody = Judges(*[None] * len(Judges._fields))
    ours, theirs = reading([3.0, 1.0, 2.0, 9.0], 2), reading([1.0, 2.0], 1)
    wins, prompt = wins_over(nobody, None, ours, theirs, "ours")
    assert (wins.tolist(), prompt.tolist()) == ([1.0, 0.5], [0, 1])
    wins, prompt = wins_over(nobody, None, theirs, ours, "theirs")
    assert (wins.tolist(), prompt.tolist()) == ([0.0, 0.5], [0, 1])
    assert len(wins_over(nobody, None, ours._replace(own=None), theirs, "ours")[0]) == 0
