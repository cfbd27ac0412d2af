"""Pooled trunk features of preference pairs, computed once for all reward heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rrlhf.data.tables import preferences
from rrlhf.rewards.heads import Pairs
from rrlhf.rewards.trunk import Trunk
from rrlhf.types import Message, Preference

FILE = "features.safetensors"
START = "start"  # sub-folder with the features of a trunk before it was trained


class PairFeatures(NamedTuple):
    """What reward heads are trained and judged on."""

    train: Pairs
    heldout: Pairs
    heldout_prompts: Tensor  # [held-out pairs]: pairs with equal numbers share a prompt

    @property
    def reference(self) -> Tensor:
        """Responses on which scores are normalised: every held-out one, [responses, ..., width]."""
        distinct: Tensor = torch.unique(torch.cat(self.heldout), dim=0)
        return distinct

    def save(self, folder: Path) -> None:
        """Write the features."""
        tensors = {"heldout.prompts": self.heldout_prompts}
        for name, pairs in (("train", self.train), ("heldout", self.heldout)):
            tensors |= {f"{name}.{side}": tensor.contiguous() for side, tensor in pairs._asdict().items()}
        save_file(tensors, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> PairFeatures:
        """Read what `save` wrote."""
        stored = load_file(folder / FILE)
        train, heldout = (Pairs(*(stored[f"{name}.{side}"] for side in Pairs._fields)) for name in ("train", "heldout"))
        return cls(train, heldout, stored["heldout.prompts"])


def started(reward: Path) -> PairFeatures:
    """Return the features that a reward model's trunk gave before it was trained itself."""
    return PairFeatures.load(reward / START if (reward / START).is_dir() else reward)


def folder_of(ensemble: Path, reward: Path) -> Path:
    """Return where the features are that an ensemble's heads read: its own, or the reward model's that it stands on."""
    return ensemble if (ensemble / FILE).exists() else reward


def read_pairs(trunk: Trunk, data: Path) -> tuple[list[Preference], list[Preference]]:
    """Return the training and the held-out pairs of a data set, but for those that a trunk cannot tell apart.

    Two responses that are the same when cut to what the trunk reads have one reward, whatever its heads learn.
    """
    train, heldout = (
        trunk.texts.apart(preferences(data, name), trunk.texts.response) for name in ("preferences", "heldout")
    )
    return train, heldout


def pair_features(
    trunk: Trunk, train: list[Preference], heldout: list[Preference], batch_size: int, label: str = "reward: features"
) -> PairFeatures:
    """Run the trunk once over every distinct response of the pairs."""
    texts = distinct([*train, *heldout])
    rows = [trunk.encode(*response) for response in texts.values()]
    features = dict(zip(texts, trunk.features(rows, batch_size, label), strict=True))
    groups: dict[str, int] = {}
    numbers = [groups.setdefault(json.dumps(pair.prompt), len(groups)) for pair in heldout]
    return PairFeatures(_gather(features, train), _gather(features, heldout), torch.tensor(numbers))


def distinct(pairs: list[Preference]) -> dict[tuple[str, str], tuple[list[Message], str]]:
    """Return every response with its prompt once, by `identity`."""
    return {identity(pair, text): (pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)}


def identity(pair: Preference, text: str) -> tuple[str, str]:
    """Return what tells one response from another."""
    return json.dumps(pair.prompt), text


def _gather(features: dict[tuple[str, str], Tensor], pairs: list[Preference]) -> Pairs:
    chosen = [features[identity(pair, pair.chosen)] for pair in pairs]
    rejected = [features[identity(pair, pair.rejected)] for pair in pairs]
    return Pairs(torch.stack(chosen), torch.stack(rejected))
