"""Stage 4: the Bayesian reward model ensemble, BRME (Yan et al. 2024, arXiv 2409.15360).

K Gaussian heads on the trunk that the single head was trained on, each on its own bootstrap sample of the pairs.
"""

from __future__ import annotations

from pathlib import Path

import torch

from rrlhf.calibration import correct, estimate, expected_calibration_error
from rrlhf.config import Ensemble, Model
from rrlhf.features import PairFeatures
from rrlhf.heads import RewardHeads, bootstrap_weights, fit, win_probability
from rrlhf.models import accelerator
from rrlhf.objectives import stage2_loss
from rrlhf.progress import track
from rrlhf.robust import READINGS, Scores, head_spread
from rrlhf.trunk import link_trunk
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
    link_trunk(reward, out)


def judge(heads: RewardHeads, features: PairFeatures) -> Metrics:
    """Return held-out accuracy of each way to read the ensemble, its calibration, and how much its heads agree."""
    chosen, rejected = heads.score(features.heldout.chosen), heads.score(features.heldout.rejected)
    metrics: Metrics = {}
    for name, reading in READINGS.items():
        accuracy = estimate(correct(reading(chosen) - reading(rejected)), features.heldout_prompts)
        metrics |= {f"heldout_accuracy_{name}": accuracy.mean, f"heldout_accuracy_{name}_stderr": accuracy.stderr}
    reference = heads.score(features.reference)
    correlations = torch.corrcoef(reference.mean.T).reshape(reference.mean.shape[1], -1)
    between = correlations[~torch.eye(len(correlations), dtype=torch.bool)]
    return metrics | {
        "heldout_ece": expected_calibration_error(win_probability(heads, features.heldout)),
        "head_correlation": between.mean().item() if len(between) else 1.0,
        "head_spread": head_spread(reference).mean().item(),
        "head_std": reference.std.mean().item(),
    }


def _refuse_identical(scores: Scores) -> None:
    if scores.mean.shape[1] > 1 and head_spread(scores).max() < 1e-4:
        raise ValueError("all reward heads give the same scores; set ensemble.head_data to bootstrap")
