"""The numbers that commits are compared by, from an evaluation small enough to check by hand."""

import csv
import io
import json
import math

import pytest
from scipy import stats

from rrlhf.tools.reporting import numbers
from rrlhf.tools.reporting.trainings import Training


def measured(mean, stderr=0.1, n=20):
    return {"mean": mean, "stderr": stderr, "n": n}


def share(mean):
    return measured(mean) | {"low": mean - 0.1, "high": mean + 0.1}


def judged(name, **readings):
    accuracy = {reading.replace("_", " "): share(mean) for reading, mean in readings.items()}
    return {"name": name, "pairs": 40, "prompts": 20, "accuracy": accuracy, "calibration": {}}


@pytest.fixture
def evaluation():
    policies = {"sft": {"gold": measured(0.0), "proxy": measured(0.2), "kl": measured(0.0, math.nan, 1)}}
    policies["robust"] = {"gold": measured(1 / 3), "proxy": measured(math.nan), "words": measured(7.0)}
    points = [
        {"policy": "robust", "update": step, "kl": step / 7, "proxy": 1.0, "sigma": 0.5, "words": 3.0, "heads": [1.0]}
        for step in (0, 1)
    ]
    return {
        "policies": [{"name": name, "settings": {}, "reward": "", "metrics": row} for name, row in policies.items()],
        "curves": points,
        "samples": [],
        "reward_models": [judged("single head", single_head=0.7), judged("ensemble", mean=0.8, worst=0.75)],
    }


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


def test_the_same_results_give_the_same_bytes(evaluation, trainings):
    again = json.loads(json.dumps(evaluation))
    assert numbers.texts(again, dict(reversed(trainings.items()))) == numbers.texts(evaluation, trainings)
    assert set(numbers.texts(evaluation, trainings)) == set(numbers.FILES)
