"""Members into one ensemble: side by side, or averaged into one reward model."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from rrlhf.rewards.features import FILE as FEATURES
from rrlhf.rewards.features import PairFeatures, folder_of, side_by_side
from rrlhf.rewards.heads import POSTERIOR, RewardHeads
from rrlhf.rewards.heads import WEIGHTS as HEADS
from rrlhf.rewards.trunk import FILE, Trunk, identity_of, link_trunk, load_trunk, save_trunk


def gathered(
    members: Mapping[str, Path], reward: Path, out: Path, sft: Path | None = None
) -> tuple[RewardHeads, PairFeatures | None]:
    """Stack the members' heads and write the trunks that they read.

    sft: the SFT model, whose layers some may read beside members that read text. Returns the heads, and the features
    [pairs, heads, width] of the members' own trunks; None where they share the reward model's.
    """
    folders = list(members.values())
    heads = stacked([RewardHeads.load(folder) for folder in folders])
    if {identity_of(folder) for folder in folders} == {identity_of(reward)}:
        link_trunk(reward, out)
        return heads, None
    layers: Path | None = None  # of the SFT model, once they are written
    for name, folder in members.items():
        (out / name).mkdir()
        if identity_of(folder):
            link_trunk(folder, out / name)
        elif layers:
            link_trunk(layers, out / name)
        else:
            layers = out / name
            save_trunk(load_trunk(folder, sft), layers, own=True)
    described = json.loads((out / next(iter(members)) / FILE).read_text(encoding="utf-8"))
    described["members"] = list(members)
    described["identity"] = sha256("".join(str(identity_of(out / name)) for name in members).encode()).hexdigest()
    (out / FILE).write_text(json.dumps(described), encoding="utf-8")
    return heads, side_by_side([PairFeatures.load(folder_of(folder, reward)) for folder in folders])


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
    states = [_widened(head.state_dict(), max(int(each.shape["width"]) for each in heads)) for head in heads]
    tensors = {name: torch.cat([state[name] for state in states]) for name in states[0] if name not in POSTERIOR}
    for name in ("feature_mean", "feature_std"):
        rows = torch.stack([state[name] for state in states])
        tensors[name] = rows[0] if (rows == rows[0]).all() else rows
    shape = heads[0].shape
    return RewardHeads(
        tensors["feature_mean"].shape[-1], len(tensors["bias"]), int(shape["hidden"]), float(shape["sigma_floor"])
    ).filled(tensors)


def _widened(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Return a head's weights and statistics for features that were filled up with zeros to `width`."""
    room, reads = width - len(state["feature_mean"]), "inner" if "inner" in state else "outer"
    return state | {
        "feature_mean": pad(state["feature_mean"], (0, room)),
        "feature_std": pad(state["feature_std"], (0, room), value=1.0),
        reads: pad(state[reads], (0, 0, 0, room)),
    }
