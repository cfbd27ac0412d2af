"""The numbers of a profile's last run that git keeps, for `dvc metrics diff` and `dvc plots diff`.

Two small texts in reports/PROFILE: metrics.json, how every policy ended and how well the reward models rank, and
curves.csv, how every training went. Their owners are evaluation.json and the histories.
"""

import csv
import io
import json
import math
from collections.abc import Mapping

from rrlhf.judging.evaluation import Evaluation
from rrlhf.tools.reporting.verdict import Training
from rrlhf.types import Json

FILES = METRICS, CURVES = "metrics.json", "curves.csv"
COMPARED = ("gold", "judge_win_rate", "proxy", "kl")
COLUMNS = ("gold", "proxy", "kl", "score", "spread", "sigma", "entropy", "response_tokens")  # of curves.csv, if known
DIGITS = 6  # significant ones, which every difference worth a look survives


def texts(evaluation: Evaluation, trainings: Mapping[str, Training]) -> dict[str, str]:
    """Return both files by name."""
    told = json.dumps(metrics(evaluation), indent=1, ensure_ascii=False)
    return {METRICS: f"{told}\n", CURVES: curves(evaluation, trainings)}


def metrics(evaluation: Evaluation) -> Json:
    """Return the means of the last comparison and the accuracies of the reward models, each with its 95 % interval.

    policies.NAME.METRIC, METRIC_low, METRIC_high: means over prompts with t-intervals (Student).
    reward_models.NAME.READING, READING_low, READING_high: shares of held-out pairs in the right order, with Wilson's
    intervals. What is not known is left out.
    """
    from rrlhf.judging.calibration import mean_interval  # here: it imports torch, and a run with nothing to do does not

    ended = {
        policy.name: {
            name: (found.mean, *mean_interval(found)) for name in COMPARED if (found := policy.metrics.get(name))
        }
        for policy in evaluation.policies
    }
    ranked = {
        _word(model.name): {
            "accuracy" if name == model.name else f"{_word(name)}_accuracy": (share.mean, share.low, share.high)
            for name, share in model.accuracy.items()
        }
        for model in evaluation.reward_models
    }
    return {
        "policies": {name: _with_bounds(found) for name, found in ended.items()},
        "reward_models": {name: _with_bounds(found) for name, found in ranked.items()},
    }


def curves(evaluation: Evaluation, trainings: Mapping[str, Training]) -> str:
    """Return a table with a row for every arm and step: means over the rollout of that step.

    gold and proxy: scores of the responses by the gold judge and by the single reward head. score: what the arm is
    paid. kl: nats per response to the start. All columns: docs/metrics.md.
    """
    rows = {(arm, int(row["step"])): dict(row) for arm, training in trainings.items() for row in training.rows}
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


def _with_bounds(known: Mapping[str, tuple[float, float, float]]) -> Json:
    found = {
        f"{name}{end}": value
        for name, row in known.items()
        for end, value in zip(("", "_low", "_high"), row, strict=True)
    }
    return {name: _short(value) for name, value in found.items() if math.isfinite(value)}


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _word(name: str) -> str:
    return name.replace(" ", "_")
