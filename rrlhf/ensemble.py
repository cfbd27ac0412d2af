"""Stage 4: the Bayesian reward model ensemble, BRME (Yan et al. 2024, arXiv 2409.15360).

K Gaussian heads on the trunk that the single head was trained on, each on its own bootstrap sample of the pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rrlhf.config import Ensemble, Model
from rrlhf.features import TRUNK, PairFeatures
from rrlhf.heads import Pairs, RewardHeads, bootstrap_weights, fit
from rrlhf.judging import heldout_metrics, judge_ensemble, score_pairs
from rrlhf.losses import gaussian_bradley_terry, gaussian_nll, reparameterised_mse
from rrlhf.models import accelerator
from rrlhf.progress import track
from rrlhf.robust import Scores, head_spread
from rrlhf.types import Log, Metrics


def run(*, seed: int, model: Model, ensemble: Ensemble, reward: Path, out: Path, log: Log) -> None:
    """Train all heads in one pass over the stored features and save them."""
    features = PairFeatures.load(reward)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    pairs = len(features.train.chosen)
    heads = RewardHeads(features.train.chosen.shape[1], ensemble.heads, ensemble.hidden, ensemble.sigma_floor)
    weights = torch.ones(pairs, ensemble.heads)
    if ensemble.head_data == "bootstrap":
        weights = bootstrap_weights(pairs, ensemble.heads, generator)
    rows = fit(
        heads,
        stage2_loss(ensemble, RewardHeads.load(reward), features.train, generator),
        features.train,
        weights,
        accelerator=accelerator(model),
        generator=generator,
        epochs=ensemble.epochs,
        pairs_per_batch=ensemble.pairs_per_batch,
        learning_rate=ensemble.learning_rate,
        weight_decay=ensemble.weight_decay,
    )
    for row in track(rows, ensemble.epochs, "ensemble"):
        log(row)
    heads = heads.cpu().eval()
    heads.normalise(features.reference)
    _refuse_identical(heads.score(features.reference))
    log({"step": ensemble.epochs, **judge(heads, features)})
    heads.save(out)
    (out / TRUNK).write_bytes((reward / TRUNK).read_bytes())


def stage2_loss(
    ensemble: Ensemble, single: RewardHeads, train: Pairs, generator: torch.Generator
) -> Callable[[Scores, Scores, Tensor], Tensor]:
    """Return the loss per pair and head that `ensemble.loss` and `ensemble.target` name."""
    if ensemble.loss == "bradley_terry":
        return lambda chosen, rejected, _: gaussian_bradley_terry(chosen, rejected)
    if ensemble.target == "stage1_reward":
        target_chosen = single.score(train.chosen).mean
        target_rejected = single.score(train.rejected).mean
    else:  # chosen and rejected lie one unit apart
        target_chosen = torch.full((len(train.chosen), 1), 0.5)
        target_rejected = -target_chosen

    def error(scores: Scores, target: Tensor) -> Tensor:
        if ensemble.loss == "gaussian_nll":
            return gaussian_nll(scores, target)
        return reparameterised_mse(scores, target, torch.randn(scores.mean.shape, generator=generator))

    return lambda chosen, rejected, index: error(chosen, target_chosen[index]) + error(rejected, target_rejected[index])


def judge(heads: RewardHeads, features: PairFeatures) -> Metrics:
    """Return held-out accuracy of each way to read the ensemble, its calibration, and how much its heads agree."""
    pairs = score_pairs(heads, features.heldout, features.heldout_prompts)
    return heldout_metrics(judge_ensemble("ensemble", pairs))


def _refuse_identical(scores: Scores) -> None:
    if scores.mean.shape[1] > 1 and head_spread(scores).max() < 1e-4:
        raise ValueError("all reward heads give the same scores; set ensemble.head_data to bootstrap")
