"""A reward model that people have, as it is: its scores are those of its own head, which nothing here trains.

The preference pairs only tell how sure it is of a score (rrlhf/rewards/posterior.py), and the held-out ones where its
scores are counted from.
"""

from pathlib import Path

import torch

from rrlhf.config import Given, Model
from rrlhf.judging.metrics import heldout_metrics, judge_single, score_pairs
from rrlhf.rewards.features import pair_features, read_pairs
from rrlhf.rewards.heads import RewardHeads
from rrlhf.rewards.trunk import given_trunk, save_trunk
from rrlhf.types import Log


def run(*, model: Model, given: Given, data: Path, out: Path, log: Log) -> None:
    """Read the pairs with the reward model, normalise its scores, and save it with what it read."""
    trunk = given_trunk(given, model)
    train, heldout = read_pairs(trunk, data)
    features = pair_features(trunk, train, heldout, given.batch_size or 1, "given: features")
    heads = RewardHeads(trunk.language.width, heads=1, hidden=0, sigma_floor=1e-3)
    heads.standardise(torch.cat(features.train))
    heads.take(trunk.language.score)
    heads.normalise(features.reference)
    heads.know(features.train, features.reference)
    judged = judge_single("as it was given", score_pairs(heads, features.heldout, features.heldout_prompts))
    log({"step": 0, **trunk.texts.told("given"), **heldout_metrics(judged)})
    heads.save(out)
    features.save(out)
    save_trunk(trunk, out, own=True)
