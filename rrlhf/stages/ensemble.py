"""Stage 4: the ensemble of reward models, by default BRME (Yan et al. 2024, arXiv 2409.15360).

BRME is K Gaussian heads on the trunk that the single head was trained on, each on its own bootstrap sample of the
pairs. Other kinds are independent members, adapters beside one trunk (UP-RLHF, arXiv 2401.00243), and the average of
members' weights (WARM, arXiv 2401.12187).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from rrlhf.config import Ensemble, GivenEnsemble, LoraEnsemble, MemberEnsemble, Model, TrunkTraining, WarmEnsemble
from rrlhf.judging.metrics import heldout_metrics, judge_ensemble, score_pairs
from rrlhf.models.adapters import adapted, diversity
from rrlhf.models.processes import accelerator
from rrlhf.progress import track
from rrlhf.rewards.features import PairFeatures, pair_features, read_pairs
from rrlhf.rewards.finetune import finetune, trainable
from rrlhf.rewards.gather import averaged, gathered
from rrlhf.rewards.heads import RewardHeads, bootstrap_weights, fit
from rrlhf.rewards.objectives import PairLoss, stage2_loss
from rrlhf.rewards.trunk import Trunk, link_trunk, load_trunk, save_trunk
from rrlhf.robust import Scores, head_spread
from rrlhf.types import Log, Metrics


def run(*, seed: int, model: Model, ensemble: Ensemble, reward: Path, out: Path, log: Log, **inputs: Any) -> None:
    """Train the ensemble of this kind, or gather it from its members, and save it.

    inputs: what its kind reads besides, which the function for that names.
    """
    own: PairFeatures | None = None  # of a trunk that is no longer the reward model's
    if isinstance(ensemble, MemberEnsemble | GivenEnsemble):
        heads, own = gathered(reward=reward, out=out, **inputs)
    elif isinstance(ensemble, WarmEnsemble):
        heads, own = average(reward=reward, out=out, **inputs)
    else:
        fitted = fit_heads(seed, model, ensemble, reward, log)
        heads = fitted.heads
        if isinstance(ensemble, LoraEnsemble) or not ensemble.freeze_backbone:
            own = train_trunk(fitted, ensemble, reward=reward, out=out, log=log, **inputs)
        else:
            link_trunk(reward, out, **inputs)
    features = own or PairFeatures.load(reward)
    heads = heads.cpu().eval()
    heads.normalise(features.reference)
    if ensemble.sigma == "posterior":
        heads.know(features.train, features.reference)
    _refuse_identical(heads.score(features.reference))
    log({"step": ensemble.epochs, **judge(heads, features)})
    heads.save(out)
    if own:
        own.save(out)


class Fitted(NamedTuple):
    """Heads that were fitted to the stored features, and what they were fitted with."""

    heads: RewardHeads
    loss: PairLoss
    weights: Tensor  # [pairs, heads]
    generator: torch.Generator
    engine: Accelerator


def fit_heads(seed: int, model: Model, ensemble: Ensemble, reward: Path, log: Log) -> Fitted:
    """Train K heads in one pass over the stored features."""
    features = PairFeatures.load(reward)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    pairs = len(features.train.chosen)
    heads = RewardHeads(features.train.chosen.shape[1], ensemble.heads, ensemble.hidden, ensemble.sigma_floor)
    weights = torch.ones(pairs, ensemble.heads)
    if ensemble.head_data == "bootstrap":
        weights = bootstrap_weights(pairs, ensemble.heads, generator)
    loss = stage2_loss(ensemble, RewardHeads.load(reward), features.train, generator)
    engine = accelerator(model)
    rows = fit(heads, loss, features.train, weights, ensemble, accelerator=engine, generator=generator)
    for row in track(rows, ensemble.epochs, "ensemble"):
        log(row)
    return Fitted(heads, loss, weights, generator, engine)


def train_trunk(
    fitted: Fitted,
    ensemble: Ensemble,
    *,
    trunk: TrunkTraining,
    data: Path,
    sft: Path,
    reward: Path,
    out: Path,
    log: Log,
) -> PairFeatures:
    """Train the heads' trunk, or an adapter of it for each head, with the heads, in place; return its features."""
    heads, loss, weights, generator, engine = fitted
    started = load_trunk(reward, sft)
    train, heldout = read_pairs(started, data)
    started, tuning, penalty = _tuning(started, ensemble, trunk)
    with tuning:
        steps = finetune(
            started, heads, loss, train, weights, trunk, engine=engine, generator=generator, penalty=penalty
        )
        for row in steps:
            log(row)
    own = pair_features(started, train, heldout, trunk.batch_size, "ensemble: trained features")
    save_trunk(started, out, own=True)
    return own


def _tuning(
    trunk: Trunk, ensemble: Ensemble, settings: TrunkTraining
) -> tuple[Trunk, AbstractContextManager[None], Callable[[], Tensor] | None]:
    """Make ready what trains with the heads: an adapter for each, or the trunk that all share."""
    if not isinstance(ensemble, LoraEnsemble):
        return trunk, trainable(trunk, settings), None
    layers = range(trunk.layer - settings.train_layers, trunk.layer)
    language = adapted(trunk.language, layers, settings.lora_rank, ensemble.heads)
    penalty = (lambda: -ensemble.diversity * diversity(language)) if ensemble.diversity else None
    return trunk._replace(language=language), nullcontext(), penalty


def average(
    *, members: dict[str, Path], reward: Path, trunk: TrunkTraining, data: Path, out: Path
) -> tuple[RewardHeads, PairFeatures | None]:
    """Average the weights of the members, and of their trunks where these trained."""
    heads, mean = averaged(members)
    if mean is None:
        link_trunk(reward, out)
        return heads, None
    train, heldout = read_pairs(mean, data)
    own = pair_features(mean, train, heldout, trunk.batch_size, "ensemble: averaged features")
    save_trunk(mean, out, own=True)
    return heads, own


def judge(heads: RewardHeads, features: PairFeatures) -> Metrics:
    """Return held-out accuracy of each way to read the ensemble, its calibration, and how much its heads agree."""
    pairs = score_pairs(heads, features.heldout, features.heldout_prompts)
    return heldout_metrics(judge_ensemble("ensemble", pairs))


def _refuse_identical(scores: Scores) -> None:
    if scores.mean.shape[1] > 1 and head_spread(scores).max() < 1e-4:
        raise ValueError("all reward heads give the same scores; set ensemble.head_data to bootstrap")
