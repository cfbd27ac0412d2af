"""The numbers that commits are compared by, from an evaluation small enough to check by hand."""

import csv
import io
import json
import math

import pytest
from scipy import stats

from rrlhf.judging.content import Calibration, Measured, RewardJudgement, Share
from rrlhf.judging.evaluation import Evaluation, Point, Policy, read_evaluation, write_evaluation
from rrlhf.tools.reporting import numbers
from rrlhf.tools.reporting.verdict import Training


def judged(name, **readings):
    accuracy = {
        reading.replace("_", " "): Share(mean, 0.1, 20, mean - 0.1, mean + 0.1) for reading, mean in readings.items()
    }
    return RewardJudgement(name, 40, 20, accuracy, Calibration(0, 0, 0, 0, None, []))


@pytest.fixture
def evaluation():
    start = {"gold": Measured(0.0, 0.1, 20), "proxy": Measured(0.2, 0.1, 20), "kl": Measured(0.0, math.nan, 1)}
    robust = {"gold": Measured(1 / 3, 0.1, 20), "proxy": Measured(math.nan, 0.1, 20), "words": Measured(7.0, 0.1, 20)}
    return Evaluation(
        policies=[Policy("sft", "", {}, start), Policy("robust", "", {}, robust)],
        curves=[Point("robust", step, step / 7, 1.0, 3.0, [1.0], 0.5) for step in (0, 1)],
        samples=[],
        reward_models=[judged("single head", single_head=0.7), judged("ensemble", mean=0.8, worst=0.75)],
    )


@pytest.fixture
def trainings():
    rows = [{"step": step, "score": 2.0 * step, "kl": step / 7, "entropy": math.inf, "seconds": 9.0} for step in (0, 1)]
    return {"robust": Training([], rows), "direct": Training([], [{"step": 1, "loss": 0.7}])}


def test_metrics_are_means_with_intervals_and_nothing_unknown(evaluation):
    found = numbers.metrics(evaluation)
    half = 0.1 * stats.t.ppf(0.975, 19)
    assert found["policies"]["robust"] == {
        "gold": pytest.approx(1 / 3, rel=1e-5),
        "gold_low": pytest.approx(1 / 3 - half, rel=1e-5),
        "gold_high": pytest.approx(1 / 3 + half, rel=1e-5),
    }
    assert found["policies"]["sft"]["kl"] == 0
    assert "kl_low" not in found["policies"]["sft"]  # of one prompt
    assert found["reward_models"] == {
        "single_head": {"accuracy": 0.7, "accuracy_low": 0.6, "accuracy_high": 0.8},
        "ensemble": {f"{reading}_accuracy{end}": pytest.approx(mean + by) for reading, mean in
                     {"mean": 0.8, "worst": 0.75}.items() for end, by in {"": 0, "_low": -0.1, "_high": 0.1}.items()},
    }  # fmt: skip
    assert all(math.isfinite(value) for policy in found["policies"].values() for value in policy.values())


def test_curves_join_the_comparison_and_the_history_of_every_arm(evaluation, trainings):
    rows = list(csv.DictReader(io.StringIO(numbers.curves(evaluation, trainings))))
    assert [(row["arm"], row["step"]) for row in rows] == [("robust", "0"), ("robust", "1")]  # direct has none of these
    assert [float(row["score"]) for row in rows] == [0.0, 2.0]
    assert [float(row["kl"]) for row in rows] == [0.0, pytest.approx(1 / 7, rel=1e-5)]
    assert {row["gold"] for row in rows} == {row["entropy"] for row in rows} == {""}
    assert {row["sigma"] for row in rows} == {"0.5"}


def test_the_same_results_give_the_same_bytes(evaluation, trainings, tmp_path):
    write_evaluation(evaluation, tmp_path)
    again = read_evaluation(tmp_path)
    assert numbers.texts(again, dict(reversed(trainings.items()))) == numbers.texts(evaluation, trainings)
    assert set(numbers.texts(evaluation, trainings)) == set(numbers.FILES)


def test_an_evaluation_of_an_earlier_version_is_read(tmp_path):
    gold = {"mean": 1.0, "stderr": math.nan, "n": 1}
    start = {"name": "sft", "reward": "none", "settings": {}, "metrics": {"gold": gold}}
    point = {"policy": "robust", "update": 0, "kl": 0.0, "proxy": 1.0, "words": 9.0, "heads": [1.0], "spread": 0.5}
    old = {"policies": [start], "curves": [point], "samples": [], "reward_models": []}
    (tmp_path / "evaluation.json").write_text(json.dumps(old))
    found = read_evaluation(tmp_path)
    assert (found.start, found.measured("gold")["sft"].mean, found.curves[0].sigma) == ("sft", 1.0, None)
    assert math.isnan(found.policies[0].metrics["gold"].stderr)
