"""Pooled trunk features of preference pairs, computed once for all reward heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rrlhf.config import Model
from rrlhf.heads import Pairs
from rrlhf.models import LanguageModel, autocast, encode_prompt, encode_text
from rrlhf.progress import track
from rrlhf.rollout import hidden_states, response_features
from rrlhf.types import Preference

FILE = "features.safetensors"
TRUNK = "trunk.json"


class PairFeatures(NamedTuple):
    """What reward heads are trained and judged on."""

    train: Pairs
    heldout: Pairs
    heldout_prompts: Tensor  # [held-out pairs]: pairs with equal numbers share a prompt

    @property
    def reference(self) -> Tensor:
        """Responses on which scores are normalised: every held-out one, [responses, width]."""
        distinct: Tensor = torch.unique(torch.cat([self.heldout.chosen, self.heldout.rejected]), dim=0)
        return distinct

    def save(self, folder: Path, layer: int) -> None:
        """Write the features, and the layer of the trunk that they came from."""
        tensors = {
            "train.chosen": self.train.chosen,
            "train.rejected": self.train.rejected,
            "heldout.chosen": self.heldout.chosen,
            "heldout.rejected": self.heldout.rejected,
            "heldout.prompts": self.heldout_prompts,
        }
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE)
        (folder / TRUNK).write_text(json.dumps({"layer": layer}), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> PairFeatures:
        """Read what `save` wrote."""
        stored = load_file(folder / FILE)
        train = Pairs(stored["train.chosen"], stored["train.rejected"])
        heldout = Pairs(stored["heldout.chosen"], stored["heldout.rejected"])
        return cls(train, heldout, stored["heldout.prompts"])


def trunk_layer(folder: Path) -> int:
    """Return the layer whose entering states a reward artifact's heads expect."""
    return int(json.loads((folder / TRUNK).read_text(encoding="utf-8"))["layer"])


def pair_features(
    language: LanguageModel,
    train: list[Preference],
    heldout: list[Preference],
    layer: int,
    batch_size: int,
    model: Model,
) -> PairFeatures:
    """Run the trunk once over every distinct response of the pairs."""
    encoded: dict[tuple[str, str], tuple[list[int], int]] = {}
    for pair in (*train, *heldout):
        for text in (pair.chosen, pair.rejected):
            prompt = encode_prompt(language, pair.prompt, model)
            answer = encode_text(language, text)[: model.response_tokens]
            encoded[_identity(pair, text)] = ([*prompt, *answer], len(prompt))
    names = sorted(encoded, key=lambda name: len(encoded[name][0]))
    batches = [names[i : i + batch_size] for i in range(0, len(names), batch_size)]
    features: dict[tuple[str, str], Tensor] = {}
    for batch in track(batches, len(batches), "reward: features"):
        sequences = [encoded[name][0] for name in batch]
        prompts = torch.tensor([encoded[name][1] for name in batch], device=language.device)
        lengths = torch.tensor([len(row) for row in sequences], device=language.device) - prompts
        with autocast(model):
            states = hidden_states(language, sequences, layer)
        pooled = response_features(states, prompts, lengths)
        features |= zip(batch, pooled.cpu(), strict=True)
    groups: dict[str, int] = {}
    numbers = [groups.setdefault(json.dumps(pair.prompt), len(groups)) for pair in heldout]
    return PairFeatures(_gather(features, train), _gather(features, heldout), torch.tensor(numbers))


def _gather(features: dict[tuple[str, str], Tensor], pairs: list[Preference]) -> Pairs:
    chosen = [features[_identity(pair, pair.chosen)] for pair in pairs]
    rejected = [features[_identity(pair, pair.rejected)] for pair in pairs]
    return Pairs(torch.stack(chosen), torch.stack(rejected))


def _identity(pair: Preference, text: str) -> tuple[str, str]:
    return json.dumps(pair.prompt), text
