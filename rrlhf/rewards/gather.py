"""Members into one ensemble: side by side, or averaged into one reward model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rrlhf.rewards.features import FILE as FEATURES
from rrlhf.rewards.features import PairFeatures
from rrlhf.rewards.heads import POSTERIOR, Pairs, RewardHeads
from rrlhf.rewards.heads import WEIGHTS as HEADS
from rrlhf.rewards.trunk import FILE, Trunk, identity_of, link_trunk, load_trunk


def side_by_side(members: Mapping[str, Path], reward: Path, out: Path) -> tuple[RewardHeads, PairFeatures | None]:
    """Stack the members' heads and write the trunks that they read.

    Returns the heads, and the features [pairs, heads, width] of the members' own trunks; None where they share the
    reward model's.
    """
    folders = list(members.values())
    heads = stacked([RewardHeads.load(folder) for folder in folders])
    if identity_of(folders[0]) == identity_of(reward):
        link_trunk(reward, out)
        return heads, None
    described = json.loads((folders[0] / FILE).read_text(encoding="utf-8"))
    described["members"] = list(members)
    described["identity"] = sha256("".join(str(identity_of(folder)) for folder in folders).encode()).hexdigest()
    for name, folder in members.items():
        (out / name).mkdir()
        link_trunk(folder, out / name)
    (out / FILE).write_text(json.dumps(described), encoding="utf-8")
    features = [PairFeatures.load(folder) for folder in folders]
    train, heldout = (
        Pairs(*(torch.stack(each, dim=1) for each in zip(*sides, strict=True)))
        for sides in ([member.train for member in features], [member.heldout for member in features])
    )
    return heads, PairFeatures(train, heldout, features[0].heldout_prompts)


def averaged(members: Mapping[str, Path]) -> tuple[RewardHeads, Trunk | None]:
    """Return one head and one trunk with the mean of the members' weights; no trunk where that was frozen.

    WARM (Rame et al. 2024, arXiv 2401.12187). The members of one run start at the same weights, without which their
    mean would be no model.
    """
    folders = list(members.values())
    weights = [load_file(folder / HEADS) for folder in folders]
    heads = RewardHeads.load(folders[0]).filled(
        {name: torch.stack([each[name] for each in weights]).mean(0) for name in weights[0]}
    )
    if not (folders[0] / FEATURES).exists():  # they read the reward model's
        return heads, None
    mean: dict[str, Tensor] = {}
    for folder in folders:  # one at a time: only the sum and one member are in memory
        trunk = load_trunk(folder, None)
        for name, tensor in trunk.language.network.state_dict().items():
            share = tensor.float() / len(folders)
            mean[name] = mean[name] + share if name in mean else share
    trunk.language.network.load_state_dict(mean)
    return heads, trunk


def stacked(heads: list[RewardHeads]) -> RewardHeads:
    """Return one module with the heads of all, each with its own statistics, before its posterior is known."""
    states = [head.state_dict() for head in heads]
    tensors = {name: torch.cat([state[name] for state in states]) for name in states[0] if name not in POSTERIOR}
    for name in ("feature_mean", "feature_std"):
        rows = torch.stack([state[name] for state in states])
        tensors[name] = rows[0] if (rows == rows[0]).all() else rows
    shape = heads[0].shape
    return RewardHeads(
        int(shape["width"]), len(tensors["bias"]), int(shape["hidden"]), float(shape["sigma_floor"])
    ).filled(tensors)
