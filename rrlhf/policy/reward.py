"""What reward models and reward functions say of responses, and what an arm's policy is paid for them."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from rrlhf.config import Arm, PaidArm, typed_arm
from rrlhf.models.load import LanguageModel
from rrlhf.models.rollout import Samples
from rrlhf.models.text import decode, most_cut
from rrlhf.policy.reward_functions import NO_COLUMNS, Columns, RewardFunction, metric_names
from rrlhf.rewards.features import PairFeatures, folder_of
from rrlhf.rewards.heads import RewardHeads
from rrlhf.rewards.scoring import RewardModel, load_for_policy, read_by, shared_layer
from rrlhf.rewards.trunk import Trunk
from rrlhf.robust import AGGREGATIONS, Scores, head_spread, most_confident, nominal_reward, worst_reward
from rrlhf.types import Message, Metrics

FILE = "arm.json"  # what a policy was paid, in its folder
LEAST_STD = 1e-6  # of an arm's reward over the reference responses; below it, the reward is a constant


class Scale(NamedTuple):
    """What an arm's aggregation gives for the reference responses; its reward is counted from there."""

    mean: float = 0.0
    std: float = 1.0


NO_SCALE = Scale()


class RewardScores(NamedTuple):
    """What the reward models and the arm's functions say about a batch of responses."""

    single: Tensor  # [batch] normalised score of the single head: the proxy
    ensemble: Scores  # [batch, heads] normalised
    functions: Mapping[str, Tensor] = MappingProxyType({})  # [batch] value of each function, by import path


Reward = Callable[[RewardScores], Tensor]  # what a policy is paid for each response of a batch, [batch]


class Responses(NamedTuple):
    """Responses with all that reward models and functions read of them, an entry a response."""

    prompts: list[list[Message]]
    texts: list[str]
    tokens: list[list[int]]
    finished: list[bool]
    columns: Columns = NO_COLUMNS  # of the data


class Prompts(NamedTuple):
    """The prompts of the data, with all that is read of them."""

    tokens: list[list[int]]
    messages: Sequence[list[Message]] = ()  # for reward models with a trunk of their own, and reward functions
    columns: Columns = NO_COLUMNS  # for reward functions
    cut: Mapping[str, float] = MappingProxyType({})  # which share of them the policy does not read whole

    def answered(self, asked: Sequence[int], samples: Samples, language: LanguageModel) -> Responses:
        """Return samples as responses to the prompts of the rows `asked`."""
        tokens = samples.lists()
        return Responses(
            prompts=[self.messages[i] for i in asked] if self.messages else [],
            texts=[decode(language, row) for row in tokens],
            tokens=tokens,
            finished=samples.finished.tolist(),
            columns={name: [values[i] for i in asked] for name, values in self.columns.items()},
        )


class RewardModels(NamedTuple):
    """All that scores responses: the single head, the ensemble, and the reward functions."""

    single: RewardModel
    ensemble: RewardModel
    layer: int | None  # of the policy's own network, whose entering states some of them read; None: none does
    functions: Sequence[RewardFunction] = ()

    def score(self, said: Responses, pooled: Tensor | None, batch_size: int, label: str = "") -> RewardScores:
        """Score responses, in a distributed launch this process's only; with a label, show how far it is.

        pooled: features [responses, width] of the SFT model's states, for the heads that read those; the others read
        the text.
        """
        models = (self.single, self.ensemble)
        single, ensemble = read_by(models, pooled, said.prompts, said.texts, batch_size, label)
        proxy = single.mean[:, 0]
        values = {each.path: torch.tensor(each.values(*said), device=proxy.device) for each in self.functions}
        return RewardScores(proxy, ensemble, values)

    def recount(self, read: Iterable[tuple[list[Message], str]]) -> None:
        """Count prompts with responses that were read before an interruption, for `cut`."""
        for prompt, text in read:
            for trunk in (*self.single.trunks, *self.ensemble.trunks):
                trunk.encode(prompt, text)

    @property
    def cut(self) -> Metrics:
        """The largest share of prompts and of responses so far that a model cut; nothing where none reads text."""
        return most_cut(model.cut for model in (self.single, self.ensemble))


def load_reward_models(
    reward: Path, ensemble: Path, device: torch.device, functions: Sequence[RewardFunction] = ()
) -> RewardModels:
    """Load what scores a policy's responses."""
    loaded: dict[str | None, Trunk] = {}
    single, several = (load_for_policy(folder, device, loaded) for folder in (reward, ensemble))
    return RewardModels(single, several, shared_layer((single, several), reward), functions)


def reference_scale(arm: PaidArm, reward: Path, ensemble: Path) -> Scale:
    """Return the scale of an arm's reward, so that a penalty or a KL weight means the same beside each of them.

    Scores of the heads have it by themselves; a minimum, or a mean less a penalty, has not.
    """
    single = RewardHeads.load(reward).score(PairFeatures.load(reward).reference).mean[:, 0]
    known = PairFeatures.load(folder_of(ensemble, reward)).reference
    found = aggregated(arm, single, RewardHeads.load(ensemble).score(known))
    std = found.std().item()
    return Scale(found.mean().item(), std) if std > LEAST_STD else Scale(found.mean().item())


def aggregated(arm: PaidArm, single: Tensor, ensemble: Scores) -> Tensor:
    """Return what an arm makes of the reward models' normalised scores, [batch], before it is put to scale."""
    return single if arm.reward == "single" else AGGREGATIONS[arm.reward](ensemble, **arm.settings)


def arm_reward(arm: PaidArm, engine: Accelerator, scale: Scale = NO_SCALE) -> Reward:
    """Return the reward [batch] that an arm's policy sees; all processes' responses count as one batch.

    To what the reward models say, each function of the arm adds its weight times its value.
    """

    def reward(scores: RewardScores) -> Tensor:
        count = len(scores.single)
        own = slice(engine.process_index * count, (engine.process_index + 1) * count)
        everyone = aggregated(arm, engine.gather(scores.single), scores.ensemble.each(engine.gather))
        return paid(arm, scale, everyone[own], scores.functions)

    return reward


def paid(arm: PaidArm, scale: Scale, aggregated: Tensor, functions: Mapping[str, Tensor]) -> Tensor:
    """Return (aggregated - mean) / std + sum over the arm's functions of weight * value, [batch], in a fixed order."""
    reward = (aggregated - scale.mean) / scale.std
    for path, weight in sorted(arm.functions.items()):
        reward = reward + weight * functions[path]
    return reward


def reward_metrics(found: RewardScores) -> Metrics:
    """Return what a batch's scores say on average: proxy, nominal, worst, spread, each head's share, each function."""
    single, scores, functions = found
    metrics = {
        "proxy": single.mean().item(),
        "nominal": nominal_reward(scores).mean().item(),
        "worst": worst_reward(scores).mean().item(),
        "spread": head_spread(scores).mean().item(),
        "sigma": scores.std.mean().item(),
    }
    shares = most_confident(scores).mean(0).tolist()
    for head, (mean, share) in enumerate(zip(scores.mean.mean(0).tolist(), shares, strict=True)):
        metrics[f"head_{head}"] = mean
        metrics[f"head_{head}_nominal"] = share
    names = metric_names(functions)
    return metrics | {names[path]: value.mean().item() for path, value in functions.items()}


def write_arm(folder: Path, arm: Arm, scale: Scale = NO_SCALE) -> None:
    """Write an arm's settings and the scale of its reward."""
    record = {"arm": arm.model_dump(mode="json"), "reference": scale._asdict()}
    (folder / FILE).write_text(json.dumps(record), encoding="utf-8")


def read_arm(folder: Path) -> tuple[Arm, Scale]:
    """Read what `write_arm` wrote."""
    record = json.loads((folder / FILE).read_bytes())
    return typed_arm(**record["arm"]), Scale(**record["reference"])
