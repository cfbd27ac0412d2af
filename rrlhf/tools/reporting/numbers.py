"""The numbers of a run that versions of the project are compared by: `dvc metrics diff`, `dvc plots diff`, git.

Two small texts in reports/PROFILE: metrics.json, how every policy ended and how well the reward models rank, and
curves.csv, how every training went. Their owners are evaluation.json and the histories.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping

from rrlhf.judging.content import RewardJudgement
from rrlhf.judging.evaluation import Evaluation, Policy
from rrlhf.tools.reporting.trainings import Training
from rrlhf.types import Json

FILES = METRICS, CURVES = "metrics.json", "curves.csv"
COMPARED = ("gold", "proxy", "kl")
COLUMNS = ("gold", "proxy", "kl", "score", "spread", "sigma", "entropy", "response_tokens")  # of curves.csv, if known
ENDS = ("", "_low", "_high")
DIGITS = 6  # significant ones, which every difference worth a look survives


def texts(evaluation: Evaluation, trainings: Mapping[str, Training]) -> dict[str, str]:
    """Return both files by name."""
    return {
        METRICS: json.dumps(metrics(evaluation), indent=1, ensure_ascii=False) + "\n",
        CURVES: curves(evaluation, trainings),
    }


def metrics(evaluation: Evaluation) -> Json:
    """Return the means of the last comparison and the accuracies of the reward models, each with its 95 % interval.

    policies.NAME.METRIC, METRIC_low, METRIC_high: means over prompts with t-intervals (Student).
    reward_models.NAME.READING, READING_low, READING_high: shares of held-out pairs in the right order, with Wilson's
    intervals. What is not known is left out.
    """
    return {
        "policies": {policy.name: _ended(policy) for policy in evaluation.policies},
        "reward_models": {_word(model.name): _ranked(model) for model in evaluation.reward_models},
    }


def curves(evaluation: Evaluation, trainings: Mapping[str, Training]) -> str:
    """Return a table with a row for every arm and step: means over the rollout of that step.

    gold and proxy: scores of the responses by the gold judge and by the single reward head. score: what the arm is
    paid. kl: nats per response to the start. All columns: docs/metrics.md.
    """
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for arm, training in trainings.items():
        for row in training.rows:
            rows.setdefault((arm, int(row["step"])), {}).update(row)
    for point in evaluation.curves:
        known = {name: value for name in COLUMNS if (value := getattr(point, name, None)) is not None}
        rows.setdefault((point.policy, point.update), {}).update(known)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", "step", *COLUMNS])
    for (arm, step), row in sorted(rows.items()):
        cells = [_short(row[name]) if math.isfinite(row.get(name, math.nan)) else "" for name in COLUMNS]
        if any(cells):
            writer.writerow([arm, step, *cells])
    return out.getvalue()


def _ended(policy: Policy) -> Json:
    """Return a policy's metrics with their intervals."""
    from rrlhf.judging.calibration import mean_interval  # here: it imports torch, and a run with nothing to do does not

    known = {name: policy.metrics[name] for name in COMPARED if name in policy.metrics}
    return _with_bounds({name: (value.mean, *mean_interval(value)) for name, value in known.items()})


def _ranked(model: RewardJudgement) -> Json:
    """Return a reward model's accuracies, by reading; a single head has one."""
    names = {name: "accuracy" if name == model.name else f"{_word(name)}_accuracy" for name in model.accuracy}
    return _with_bounds({names[name]: (share.mean, share.low, share.high) for name, share in model.accuracy.items()})


def _with_bounds(known: Mapping[str, tuple[float, float, float]]) -> Json:
    found = {f"{name}{end}": value for name, row in known.items() for end, value in zip(ENDS, row, strict=True)}
    return {name: _short(value) for name, value in found.items() if math.isfinite(value)}


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _word(name: str) -> str:
    return name.replace(" ", "_")
