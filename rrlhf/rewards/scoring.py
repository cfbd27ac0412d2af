"""A reward model as its users see it: text in, scores out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rrlhf.rewards.heads import RewardHeads
from rrlhf.rewards.trunk import FILE, Trunk, identity_of, load_trunk, trunk_layer
from rrlhf.robust import Scores
from rrlhf.types import Message, Metrics


class RewardModel(NamedTuple):
    """Heads with the trunks whose features they read: one for all heads, or one for each."""

    heads: RewardHeads
    trunks: tuple[Trunk, ...]
    identity: str | None  # equal for reward models whose features are the same; None: the policy's own frozen layers

    def features(
        self, prompts: Sequence[list[Message]], responses: Sequence[str], batch_size: int, label: str = ""
    ) -> Tensor:
        """Return what the heads read, [responses, width] or [responses, heads, width], on the CPU."""
        found = [
            trunk.features([trunk.encode(*pair) for pair in zip(prompts, responses, strict=True)], batch_size, label)
            for trunk in self.trunks
        ]
        return found[0] if len(found) == 1 else torch.stack(found, dim=1)

    def score(
        self, prompts: Sequence[list[Message]], responses: Sequence[str], batch_size: int = 32, label: str = ""
    ) -> Scores:
        """Return normalised scores [responses, heads] on the CPU; with a label, show how far it is.

        Texts are cut to the model's token limits. Order and batch size change nothing but rounding.
        """
        return self.heads.score(self.features(prompts, responses, batch_size, label)).each(Tensor.cpu)

    @property
    def cut(self) -> Metrics:
        """The share of the prompts and of the responses so far that were cut to what the trunks read."""
        return self.trunks[0].texts.cut if self.trunks else {}  # all have one tokenizer and the same limits


def load_reward_model(folder: Path, shared_trunk: Path | None, device: torch.device | None = None) -> RewardModel:
    """Load a reward or ensemble artifact. One without a trunk of its own needs the SFT model's folder.

    device: where it runs; None: where it was trained. Raises ValueError when the folder is missing.
    """
    described = json.loads((folder / FILE).read_text(encoding="utf-8"))
    members = [folder / name for name in described.get("members", [])]
    trunks = tuple(load_trunk(part, shared_trunk, device) for part in members or [folder])
    return RewardModel(RewardHeads.load(folder).to(trunks[0].language.device), trunks, identity_of(folder))


def load_for_policy(folder: Path, device: torch.device) -> RewardModel:
    """Load a reward model for the rollouts of a policy.

    Without a trunk of its own it gets none here: the policy's pass gives its features.
    """
    if identity_of(folder) is None:
        return RewardModel(RewardHeads.load(folder).to(device), (), None)
    return load_reward_model(folder, None, device)


def shared_layer(models: Sequence[RewardModel], reward: Path) -> int | None:
    """Return the layer of the policy's own network whose entering states some of the models read; None: none does."""
    return trunk_layer(reward) if None in {model.identity for model in models} else None


def read_by(
    models: Sequence[RewardModel],
    pooled: Tensor | None,
    prompts: Sequence[list[Message]],
    responses: Sequence[str],
    batch_size: int,
    label: str = "",
) -> list[Scores]:
    """Return each model's normalised scores [responses, heads]; with a label, show how far it is.

    pooled: features [responses, width] from the policy's pass, for the models without a trunk of their own. Models
    with the same trunk share one pass.
    """
    features: dict[str | None, Tensor] = {} if pooled is None else {None: pooled}
    for model in models:
        if model.identity not in features:
            features[model.identity] = model.features(prompts, responses, batch_size, label)
    return [model.heads.score(features[model.identity]) for model in models]
