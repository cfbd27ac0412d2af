"""Stage 3: the single-head reward model, by maximum likelihood of the preferences (Bradley and Terry 1952)."""

from pathlib import Path

import torch

from rrlhf.config import Model, Reward
from rrlhf.judging.metrics import heldout_metrics, judge_single, score_pairs
from rrlhf.models.processes import accelerator
from rrlhf.progress import track
from rrlhf.rewards.features import START, pair_features, read_pairs
from rrlhf.rewards.finetune import finetune, trainable
from rrlhf.rewards.heads import RewardHeads, fit
from rrlhf.rewards.objectives import single_loss
from rrlhf.rewards.trunk import save_trunk, start_trunk
from rrlhf.types import Log


def run(*, seed: int, model: Model, reward: Reward, data: Path, sft: Path, out: Path, log: Log) -> None:
    """Compute the trunk's features, train one head on them, then the trunk if it may train, and save all three."""
    engine = accelerator(model)
    trunk = start_trunk(reward, model, sft)
    train, heldout = read_pairs(trunk, data)
    features = start = pair_features(trunk, train, heldout, reward.batch_size)
    log({"step": 0, **trunk.texts.told("reward")})
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    heads = RewardHeads(features.train.chosen.shape[1], heads=1, hidden=0, sigma_floor=1e-3)
    single, weights = single_loss(reward), torch.ones(len(features.train.chosen), 1)
    rows = fit(heads, single, features.train, weights, reward, accelerator=engine, generator=generator)
    for row in track(rows, reward.epochs, "reward"):
        log(row)
    if reward.trunk != "frozen":
        with trainable(trunk, reward):
            for row in finetune(trunk, heads, single, train, weights, reward, engine=engine, generator=generator):
                log(row)
        features = pair_features(trunk, train, heldout, reward.batch_size, "reward: trained features")
    heads = heads.cpu().eval()
    heads.normalise(features.reference)
    heads.know(features.train, features.reference)
    judged = judge_single("single head", score_pairs(heads, features.heldout, features.heldout_prompts))
    log({"step": reward.epochs, **heldout_metrics(judged)})
    heads.save(out)
    features.save(out)
    if start is not features:  # members start here too
        (out / START).mkdir()
        start.save(out / START)
    save_trunk(trunk, out, own=reward.base is not None or reward.trunk != "frozen")
