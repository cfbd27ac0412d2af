"""A reward model as its users see it: text in, scores out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rrlhf.models.text import most_cut
from rrlhf.rewards.features import beside
from rrlhf.rewards.heads import RewardHeads
from rrlhf.rewards.trunk import FILE, Trunk, identity_of, load_trunk, trunk_layer
from rrlhf.robust import Scores
from rrlhf.types import Message, Metrics


class RewardModel(NamedTuple):
    """Heads with the trunks whose features they read: one for all heads, or one for each."""

    heads: RewardHeads
    trunks: tuple[Trunk, ...]  # none where the policy's pass gives the features

    def features(
        self,
        prompts: Sequence[list[Message]],
        responses: Sequence[str],
        batch_size: int,
        label: str = "",
        known: dict[str | None, Tensor] | None = None,
    ) -> Tensor:
        """Return what the heads read, [responses, width] or [responses, heads, width], on the CPU.

        known: features of these responses by their trunk's identity, None for the policy's pass; grows by those of the
        trunks that run.
        """
        known = {} if known is None else known
        for trunk in self.trunks:
            if trunk.identity not in known:
                rows = [trunk.encode(*pair) for pair in zip(prompts, responses, strict=True)]
                known[trunk.identity] = trunk.features(rows, batch_size, label)
        found = [known[trunk.identity] for trunk in self.trunks] or [known[None]]
        return found[0] if len(found) == 1 else beside(found)

    def score(
        self, prompts: Sequence[list[Message]], responses: Sequence[str], batch_size: int = 32, label: str = ""
    ) -> Scores:
        """Return normalised scores [responses, heads] on the CPU; with a label, show how far it is.

        Texts are cut to the model's token limits. Order and batch size change nothing but rounding.
        """
        return self.heads.score(self.features(prompts, responses, batch_size, label)).each(Tensor.cpu)

    @property
    def cut(self) -> Metrics:
        """The share of the prompts and of the responses so far that were cut; of several trunks the largest."""
        return most_cut(trunk.texts.cut for trunk in self.trunks)


def load_reward_model(
    folder: Path,
    shared_trunk: Path | None,
    device: torch.device | None = None,
    loaded: dict[str | None, Trunk] | None = None,
) -> RewardModel:
    """Load a reward or ensemble artifact. One without a trunk of its own needs the SFT model's folder.

    device: where it runs; None: where it was trained. loaded: trunks that are in memory, by identity; grows. Raises
    ValueError when the folder is missing.
    """
    described, trunks = json.loads((folder / FILE).read_text(encoding="utf-8")), {} if loaded is None else loaded
    parts = [folder / name for name in described.get("members", [])] or [folder]
    for part in parts:
        if identity_of(part) not in trunks:
            trunks[identity_of(part)] = load_trunk(part, shared_trunk, device)
    own = tuple(trunks[identity_of(part)] for part in parts)
    return RewardModel(RewardHeads.load(folder).to(own[0].language.device), own)


def load_for_policy(folder: Path, device: torch.device, loaded: dict[str | None, Trunk]) -> RewardModel:
    """Load a reward model for the rollouts of a policy; loaded: as of `load_reward_model`.

    Without a trunk of its own it gets none here: the policy's pass gives its features.
    """
    if identity_of(folder) is None:
        return RewardModel(RewardHeads.load(folder).to(device), ())
    return load_reward_model(folder, None, device, loaded)


def shared_layer(models: Sequence[RewardModel], reward: Path) -> int | None:
    """Return the layer of the policy's own network whose entering states some of the models read; None: none does."""
    return None if all(model.trunks for model in models) else trunk_layer(reward)


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
    known: dict[str | None, Tensor] = {} if pooled is None else {None: pooled}
    return [model.heads.score(model.features(prompts, responses, batch_size, label, known)) for model in models]
