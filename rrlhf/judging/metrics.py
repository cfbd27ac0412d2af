"""How good a reward model is, from its scores of preference pairs: the one owner of every such number.

Probabilities come from log-odds in the units of the heads' training loss. A head trained by Bradley-Terry states
log-odds of its own; one that regresses on another reward does not, and its probabilities are honest only as far as
that reward's were: the fitted temperature says by which factor they are off.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rrlhf.judging.calibration import (
    area_under_curve,
    brier_score,
    correct,
    estimate,
    expected_calibration_error,
    fitted_temperature,
    head_correlation,
    maximum_calibration_error,
    measured_share,
    negative_log_likelihood,
    rank_correlation,
    reliability,
    within_central_interval,
)
from rrlhf.judging.content import Calibration, Coverage, GoldAgreement, Heads, RewardJudgement
from rrlhf.losses import gaussian_log_odds
from rrlhf.rewards.heads import Pairs, RewardHeads
from rrlhf.robust import READINGS, Scores, difference_std, head_spread, mean_reward
from rrlhf.types import Metrics

LEVELS = (0.5, 0.8, 0.9, 0.95)
OVERRATED = 0.5  # standard deviations by which a reward is above gold


class PairScores(NamedTuple):
    """A reward model's scores of pairs, normalised per head."""

    chosen: Scores  # [pairs, heads]
    rejected: Scores  # [pairs, heads]
    scale: Tensor  # [heads] log-odds in one normalised unit
    prompts: Tensor  # [pairs]: pairs with equal numbers share a prompt


def score_pairs(heads: RewardHeads, pairs: Pairs, prompts: Tensor) -> PairScores:
    """Score stored features."""
    return PairScores(heads.score(pairs.chosen), heads.score(pairs.rejected), heads.score_std, prompts)


def judge_single(name: str, pairs: PairScores) -> RewardJudgement:
    """Judge a single head, of whose score there is one reading."""
    return _judgement(name, pairs, {"single head": mean_reward})


def judge_ensemble(name: str, pairs: PairScores) -> RewardJudgement:
    """Judge Gaussian heads: every reading of them, their mean probability, and what they say about each other."""
    judgement = _judgement(name, pairs, READINGS)
    return replace(judgement, heads=_heads(pairs)) if pairs.scale.numel() > 1 else judgement


def log_odds(pairs: PairScores) -> Tensor:
    """Return the log-odds [pairs] of the heads' average P(chosen wins), each head's noise integrated out.

    Computed from logarithms throughout: it stays finite where the probability rounds to 0 or 1.
    """
    margin, scale = pairs.chosen.mean.double() - pairs.rejected.mean, pairs.scale
    sigma = difference_std(pairs.chosen, pairs.rejected).double()
    none = torch.zeros_like(margin)
    each = gaussian_log_odds(Scores(margin * scale, sigma * scale), Scores(none, none))
    wins, losses = logsigmoid(each).logsumexp(dim=1), logsigmoid(-each).logsumexp(dim=1)
    return wins - losses


def heldout_metrics(judgement: RewardJudgement) -> Metrics:
    """Return a judgement as the flat metrics that a training stage logs; what is undetermined is left out."""
    calibration, heads = judgement.calibration, judgement.heads
    metrics: dict[str, float | None] = {}
    for reading, accuracy in judgement.accuracy.items():
        name = "heldout_accuracy" + ("" if reading == "single head" else f"_{reading}")
        metrics |= {name: accuracy.mean, f"{name}_stderr": accuracy.stderr}
    metrics |= {f"heldout_{name}": getattr(calibration, name) for name in ("ece", "mce", "brier", "nll", "temperature")}
    if heads:
        metrics |= {
            "head_correlation": _mean_off_diagonal(heads.correlation),
            "head_spread": heads.spread.mean,
            "head_std": heads.sigma,
        }
    return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}


def agreement_with_gold(name: str, scores: Scores, gold: Tensor, start: Tensor, prompts: Tensor) -> GoldAgreement:
    """Compare an ensemble's beliefs [responses, heads] about a policy's responses with the gold judge's [responses].

    Gold is standardised by the start's responses [n], as the heads are by the reference responses. The ensemble's
    Gaussian has the moments of the mixture of its heads (Lakshminarayanan et al. 2017, arXiv 1612.01474). What this
    measures is whether its errors are as large as it says in these units; a reward that ranks like gold on another
    scale is not perfect here.
    """
    target = (gold - start.mean()) / start.std().clamp(min=1e-6)
    mean, std = mean_reward(scores), (scores.std**2).mean(1).add(head_spread(scores) ** 2).sqrt()
    error = (target - mean).abs()
    return GoldAgreement(
        name=name,
        rank_correlation=rank_correlation(mean, gold),
        coverage=_coverage(mean, std, target, prompts),
        spread_warns=rank_correlation(head_spread(scores), error),
        sigma_warns=rank_correlation(scores.std.mean(1), error),
        overrated_auc=area_under_curve(scores.std.mean(1), mean - target > OVERRATED),
    )


def _judgement(name: str, pairs: PairScores, readings: dict[str, Callable[[Scores], Tensor]]) -> RewardJudgement:
    accuracies = {
        reading: measured_share(correct(read(pairs.chosen) - read(pairs.rejected)), pairs.prompts)
        for reading, read in readings.items()
    }
    odds = log_odds(pairs).double()
    probability = odds.sigmoid()
    calibration = Calibration(
        ece=expected_calibration_error(probability),
        mce=maximum_calibration_error(probability),
        brier=brier_score(probability),
        nll=negative_log_likelihood(odds),
        temperature=fitted_temperature(odds),
        reliability=reliability(probability),
    )
    return RewardJudgement(name, len(pairs.prompts), len(pairs.prompts.unique()), accuracies, calibration)


def _heads(pairs: PairScores) -> Heads:
    margin = pairs.chosen.mean - pairs.rejected.mean
    sigma = difference_std(pairs.chosen, pairs.rejected)
    responses = joined([pairs.chosen, pairs.rejected])
    correlation = head_correlation(responses.mean).tolist()
    wrong = 1 - correct(margin.mean(1))
    # Each head's interval is asked whether it holds each of the others' margins.
    own, other = (~torch.eye(margin.shape[1], dtype=torch.bool)).nonzero(as_tuple=True)
    asked = pairs.prompts[:, None].expand(-1, len(own)).flatten()
    return Heads(
        accuracy=[measured_share(correct(head), pairs.prompts) for head in margin.T],
        correlation=[[value if math.isfinite(value) else None for value in row] for row in correlation],
        spread=estimate(head_spread(responses), pairs.prompts.repeat(2)),
        sigma=responses.std.mean().item(),
        coverage=_coverage(margin[:, own].flatten(), sigma[:, own].flatten(), margin[:, other].flatten(), asked),
        spread_warns=rank_correlation(margin.std(dim=1, correction=0), wrong),
        sigma_warns=rank_correlation(sigma.mean(1), wrong),
    )


def _coverage(mean: Tensor, std: Tensor, target: Tensor, prompts: Tensor) -> list[Coverage]:
    return [Coverage(level, estimate(within_central_interval(mean, std, target, level), prompts)) for level in LEVELS]


def _mean_off_diagonal(correlation: list[list[float | None]]) -> float | None:
    known = [value for i, row in enumerate(correlation) for j, value in enumerate(row) if i != j and value is not None]
    return fmean(known) if known else None


def joined(parts: Sequence[Scores]) -> Scores:
    """Return the scores of several batches as those of one."""
    offsets = [part.offset for part in parts if part.offset is not None]
    mean, std = torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts])
    return Scores(mean, std, torch.cat(offsets) if offsets else None)
