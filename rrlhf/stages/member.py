"""Stage 3b: one member of an ensemble of independent reward models; its seed is its number.

On a frozen trunk a member is one head on the reward stage's features. Otherwise all members start at the same trunk
and the same head, trained on all pairs, so that their weights may be averaged (WARM, arXiv 2401.12187); they differ by
the pairs that they draw and by the order of these.
"""

from pathlib import Path

import torch

from rrlhf.config import Member, Model, TrunkTraining
from rrlhf.judging.metrics import heldout_metrics, judge_ensemble, score_pairs
from rrlhf.models.processes import accelerator
from rrlhf.progress import track
from rrlhf.rewards.features import PairFeatures, pair_features, read_pairs, started
from rrlhf.rewards.finetune import finetune, trainable
from rrlhf.rewards.heads import RewardHeads, bootstrap_weights, fit
from rrlhf.rewards.objectives import stage2_loss
from rrlhf.rewards.trunk import link_trunk, save_trunk, start_trunk
from rrlhf.types import Log

COMMON_SEED = 0


def run(
    *,
    seed: int,
    model: Model,
    member: Member,
    trunk: TrunkTraining,
    data: Path,
    sft: Path,
    reward: Path,
    out: Path,
    log: Log,
) -> None:
    """Train one reward model with a single head, and save it with its trunk if that is its own."""
    features = started(reward)
    pairs = len(features.train.chosen)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(pairs, 1)
    if member.head_data == "bootstrap":
        weights = bootstrap_weights(pairs, 1, generator)
    stored = PairFeatures.load(reward)  # what the single head reads, for losses that aim at its rewards
    loss = stage2_loss(member, RewardHeads.load(reward), stored.train, generator)
    frozen, engine = trunk.trunk == "frozen", accelerator(model)
    torch.manual_seed(seed if frozen else COMMON_SEED)
    heads = RewardHeads(features.train.chosen.shape[-1], 1, member.hidden, member.sigma_floor)
    rows = fit(
        heads,
        loss,
        features.train,
        weights if frozen else torch.ones_like(weights),
        member,
        accelerator=engine,
        generator=generator if frozen else torch.Generator().manual_seed(COMMON_SEED),
    )
    for row in track(rows, member.epochs, "member"):
        log(row)
    own = None if frozen else start_trunk(trunk, model, sft)
    if own:
        torch.manual_seed(seed)
        train, heldout = read_pairs(own, data)
        with trainable(own, trunk):
            for row in finetune(own, heads, loss, train, weights, trunk, engine=engine, generator=generator):
                log(row)
        features = pair_features(own, train, heldout, trunk.batch_size, "member: trained features")
        features.save(out)
        save_trunk(own, out, own=True)
    else:
        link_trunk(reward, out)
    heads = heads.cpu().eval()
    heads.normalise(features.reference)
    if member.sigma == "posterior":
        heads.know(features.train, features.reference)
    judged = judge_ensemble("member", score_pairs(heads, features.heldout, features.heldout_prompts))
    log({"step": member.epochs, **heldout_metrics(judged)})
    heads.save(out)
