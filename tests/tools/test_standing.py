"""The report's first screen says in words what the numbers say, and no more."""

import math
from dataclasses import replace

import pytest

from rrlhf.judging.content import Measured
from rrlhf.judging.evaluation import Evaluation, OwnJudge, Point, Policy
from rrlhf.policy.health import Event
from rrlhf.tools.reporting.verdict import Training, headline, standings, verdict


def measured(mean: float, stderr: float = 0.1) -> Measured:
    return Measured(mean, stderr, 96)


def policy(name: str, reward: str = "single", **metrics: Measured) -> Policy:
    return Policy(name, reward, {}, metrics)


def evaluation(*arms: Policy, **start: Measured) -> Evaluation:
    return Evaluation([policy("sft", "none", **start), *arms], curves=[], samples=[], reward_models=[])


def words(gold: Measured, start: float = 1.0) -> str:
    [standing] = standings(evaluation(policy("arm", gold=gold), gold=measured(start)), {})
    return standing.words


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        (measured(1.29), "better than the start"),  # 0.29 > 2 sqrt(0.02) = 0.283
        (measured(1.28), "not clearly different from the start"),
        (measured(0.72), "not clearly different from the start"),
        (measured(0.71), "worse than the start"),
        (measured(9.0, math.nan), "not clearly different from the start"),
    ],
)
def test_two_standard_errors_decide(gold, said):
    assert words(gold) == said


@pytest.mark.parametrize(
    ("collapsed", "told"),
    [
        ({"words": measured(4.0)}, "words from 12 to 4"),
        ({"repetition": measured(0.3)}, "repetition from 0.1 to 0.3"),
        ({"gibberish": measured(0.25)}, "gibberish from 0.1 to 0.25"),
        ({"words": measured(8.1), "repetition": measured(0.19), "gibberish": measured(0.0)}, ""),
    ],
)
def test_a_policy_whose_responses_collapsed_is_not_called_better(collapsed, told):
    start = {"gold": measured(1.0), "words": measured(12.0), "repetition": measured(0.1), "gibberish": measured(0.1)}
    case = evaluation(policy("arm", **(start | {"gold": measured(3.0)} | collapsed)), **start)
    [standing] = standings(case, {})
    if told:
        assert standing.words == "scored above the start, but with responses that have collapsed"
        assert standing.warnings == [f"its responses have collapsed ({told})"]
    else:
        assert (standing.words, standing.warnings) == ("better than the start", [])


def test_changes_have_intervals_of_two_standard_errors_of_the_difference():
    arm = policy("arm", gold=measured(2.0, 0.3), proxy=measured(-1.0, 0.0))
    [standing] = standings(evaluation(arm, gold=measured(1.0, 0.4), proxy=measured(0.5, 0.0)), {})
    assert standing.changes == {"gold": "+1.00 (+0.00 to +2.00)", "proxy": "-1.50 (-1.50 to -1.50)"}


def test_the_headline_groups_arms_that_came_out_alike():
    arms = [policy(name, gold=measured(gold)) for name, gold in (("a", 2.0), ("b", 0.0), ("c", 3.0), ("d", 1.0))]
    case = evaluation(*arms, gold=measured(1.0))
    told = headline(standings(case, {}), case)
    better, worse, same = "a and c are better than the start", "b is worse than the start", "d is not clearly different"
    assert told == f"By the independent judge, {better}; {worse}; {same} from the start."


def test_without_a_judge_nothing_is_said_of_quality():
    case = evaluation(policy("a", proxy=measured(9.0)), proxy=measured(0.0))
    found = standings(case, {})
    assert (
        headline(found, case) == "No independent judge read this run: whether the responses became better is not known."
    )
    assert found[0].words == "not judged"
    assert found[0].changes.keys() == {"proxy"}


def test_without_gold_the_judge_that_the_user_brought_decides_by_its_win_rate():
    arms = [policy("a", judge_win_rate=measured(0.8, 0.05)), policy("b", judge_win_rate=measured(0.55, 0.05))]
    case = evaluation(*arms, judge_win_rate=measured(0.5, 0.0))
    case = replace(case, judge=OwnJudge("gpt-x", 84, 12345, 168, {"refused": 1, "HTTP 500": 2}))
    assert verdict(case, {}) == [
        "By the judge gpt-x, a is better than the start; b is not clearly different from the start.",
        "a has the highest judge win rate, +0.25 (+0.11 to +0.39) over b.",
        "gpt-x compared each response with the start's, in both orders: 84 requests, 12,345 tokens read and 168 "
        "written; left out without a verdict: refused (1), HTTP 500 (2).",
        "a against the start: judge win rate +0.30 (+0.20 to +0.40); no warning.",
        "b against the start: judge win rate +0.05 (-0.05 to +0.15); no warning.",
    ]
    arms = [policy("a", gold=measured(0.0), judge_win_rate=measured(0.8, 0.05))]
    case = replace(evaluation(*arms, gold=measured(1.0), judge_win_rate=measured(0.5, 0.0)), judge=case.judge)
    assert verdict(case, {})[0] == "By the independent judge, a is worse than the start."


def test_warnings_are_those_of_the_courses_and_of_the_detectors():
    known = evaluation(policy("a", gold=measured(0.0)), policy("b", gold=measured(2.0)), gold=measured(1.0))
    for update, gold in enumerate([1.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0]):
        known.curves.append(Point("a", update, 1.0, update, 9.0, [], gold=gold, gold_stderr=0.1))
    event = Event(5, "hacking_suspected", "score rose", "warned")
    a, b = standings(known, {"a": Training([event], []), "b": Training([], [])})
    assert a.warnings == [
        "gold fell by 2.00 ± 0.08 from its best, around update 2, while the reward rose",
        "hacking suspected at rollout 5 (warned)",
    ]
    assert b.warnings == []


def test_nothing_is_said_without_a_start():
    assert standings(Evaluation([policy("a", gold=measured(1.0))], [], [], []), {}) == []
