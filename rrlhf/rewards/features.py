"""Pooled trunk features of preference pairs, computed once for all reward heads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from rrlhf.data.tables import preferences
from rrlhf.rewards.heads import Pairs
from rrlhf.rewards.trunk import Trunk
from rrlhf.types import Message, Preference

FILE = "features.safetensors"
NAMES = ("train.names", "heldout.names")
START = "start"  # sub-folder with the features of a trunk before it was trained


class PairFeatures(NamedTuple):
    """What reward heads are trained and judged on."""

    train: Pairs
    heldout: Pairs
    heldout_prompts: Tensor  # [held-out pairs]: pairs with equal numbers share a prompt
    names: tuple[Tensor, Tensor] | None = None  # [pairs] of both, by which other trunks' features of a pair are found

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
        if self.names is not None:
            tensors |= dict(zip(NAMES, self.names, strict=True))
        save_file(tensors, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> PairFeatures:
        """Read what `save` wrote."""
        stored = load_file(folder / FILE)
        train, heldout = (Pairs(*(stored[f"{name}.{side}"] for side in Pairs._fields)) for name in ("train", "heldout"))
        names = (stored[NAMES[0]], stored[NAMES[1]]) if NAMES[0] in stored else None
        return cls(train, heldout, stored["heldout.prompts"], names)


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
    names = _names(train), _names(heldout)
    return PairFeatures(_gather(features, train), _gather(features, heldout), torch.tensor(numbers), names)


def side_by_side(features: Sequence[PairFeatures]) -> PairFeatures:
    """Put what several trunks made of the same pairs side by side, [pairs, trunks, widest].

    A pair that one of them cannot tell apart is left out for all.
    """
    names = [
        each.names or tuple(torch.arange(len(side.chosen)) for side in (each.train, each.heldout)) for each in features
    ]
    train, _ = _aligned([each.train for each in features], [each[0] for each in names])
    heldout, kept = _aligned([each.heldout for each in features], [each[1] for each in names])
    return PairFeatures(train, heldout, features[0].heldout_prompts[kept])


def _aligned(sides: Sequence[Pairs], names: Sequence[Tensor]) -> tuple[Pairs, Tensor]:
    """Return the pairs that all trunks have, side by side, and which of the first trunk's these are."""
    kept = [torch.stack([torch.isin(own, other) for other in names]).all(0) for own in names]
    chosen, rejected = ([side[i][rows] for side, rows in zip(sides, kept, strict=True)] for i in (0, 1))
    return Pairs(beside(chosen), beside(rejected)), kept[0]


def beside(features: Sequence[Tensor]) -> Tensor:
    """Put features [rows, width] of several trunks side by side, [rows, trunks, widest], filled up with zeros."""
    width = max(each.shape[1] for each in features)
    return torch.stack([pad(each, (0, width - each.shape[1])) for each in features], dim=1)


def distinct(pairs: list[Preference]) -> dict[tuple[str, str], tuple[list[Message], str]]:
    """Return every response with its prompt once, by `identity`."""
    return {identity(pair, text): (pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)}


def _names(pairs: list[Preference]) -> Tensor:
    digests = (sha256(json.dumps(pair).encode()).digest() for pair in pairs)
    return torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in digests], dtype=torch.long)


def identity(pair: Preference, text: str) -> tuple[str, str]:
    """Return what tells one response from another."""
    return json.dumps(pair.prompt), text


def _gather(features: dict[tuple[str, str], Tensor], pairs: list[Preference]) -> Pairs:
    chosen = [features[identity(pair, pair.chosen)] for pair in pairs]
    rejected = [features[identity(pair, pair.rejected)] for pair in pairs]
    return Pairs(torch.stack(chosen), torch.stack(rejected))
