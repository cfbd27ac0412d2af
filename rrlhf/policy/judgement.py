"""What the reward models and reward functions say about a rollout, and what an arm's policy is paid for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from rrlhf.config import Arm
from rrlhf.models.load import LanguageModel
from rrlhf.models.rollout import Samples, response_features, text_lengths
from rrlhf.models.text import decode
from rrlhf.policy.arm_record import NO_SCALE, Scale
from rrlhf.policy.reward_functions import NO_COLUMNS, Columns, RewardFunction, metric_names
from rrlhf.rewards.features import folder_of, reference
from rrlhf.rewards.heads import RewardHeads
from rrlhf.rewards.scoring import RewardModel, read_by
from rrlhf.robust import AGGREGATIONS, Scores, head_spread, most_confident, nominal_reward, worst_reward
from rrlhf.types import Message, Metrics

LEAST_STD = 1e-6  # of an arm's reward over the reference responses; below it, the reward is a constant


class Judgement(NamedTuple):
    """What the reward models and the arm's functions say about a batch of responses."""

    single: Tensor  # [batch] normalised score of the single head: the proxy
    ensemble: Scores  # [batch, heads] normalised
    functions: Mapping[str, Tensor] = MappingProxyType({})  # [batch] value of each function, by import path


def reference_scale(arm: Arm, reward: Path, ensemble: Path) -> Scale:
    """Return the scale of an arm's reward, so that a penalty or a KL weight means the same beside each of them.

    Scores of the heads have it by themselves; a minimum, or a mean less a penalty, has not.
    """
    if arm.reward is None:
        return NO_SCALE
    single = RewardHeads.load(reward).score(reference(reward)).mean[:, 0]
    found = aggregated(arm, single, RewardHeads.load(ensemble).score(reference(folder_of(ensemble, reward))))
    std = found.std().item()
    return Scale(found.mean().item(), std) if std > LEAST_STD else Scale(found.mean().item())


def aggregated(arm: Arm, single: Tensor, ensemble: Scores) -> Tensor:
    """Return what an arm makes of the reward models' normalised scores, [batch], before it is put to scale."""
    return single if arm.reward == "single" else AGGREGATIONS[str(arm.reward)](ensemble, **arm.settings)


def arm_reward(arm: Arm, engine: Accelerator, scale: Scale = NO_SCALE) -> Callable[[Judgement], Tensor]:
    """Return the reward [batch] that an arm's policy sees; all processes' responses count as one batch.

    To what the reward models say, each function of the arm adds its weight times its value.
    """

    def reward(judgement: Judgement) -> Tensor:
        count = len(judgement.single)
        own = slice(engine.process_index * count, (engine.process_index + 1) * count)
        everyone = aggregated(arm, engine.gather(judgement.single), judgement.ensemble.each(engine.gather))
        return paid(arm, scale, everyone[own], judgement.functions)

    return reward


def paid(arm: Arm, scale: Scale, aggregated: Tensor, functions: Mapping[str, Tensor]) -> Tensor:
    """Return (aggregated - mean) / std + sum over the arm's functions of weight * value, [batch], in a fixed order."""
    reward = (aggregated - scale.mean) / scale.std
    for path, weight in sorted(arm.functions.items()):
        reward = reward + weight * functions[path]
    return reward


def function_values(
    functions: Sequence[RewardFunction],
    prompts: Sequence[list[Message]],
    responses: Sequence[str],
    tokens: Sequence[list[int]],
    finished: Sequence[bool],
    columns: Columns,
) -> dict[str, Tensor]:
    """Return every function's value [responses] for each response, on the CPU, by import path."""
    return {each.path: torch.tensor(each.values(prompts, responses, tokens, finished, columns)) for each in functions}


def judge(
    samples: Samples,
    single: RewardModel,
    ensemble: RewardModel,
    *,
    states: Tensor | None,
    language: LanguageModel,
    asked: Sequence[list[Message]],
    microbatch_size: int,
    functions: Sequence[RewardFunction] = (),
    columns: Columns = NO_COLUMNS,
) -> Judgement:
    """Score the responses, from a pass of the SFT model's layers where reward heads read those, else from their text.

    states: [batch, tokens, width] at the reward heads' layer, padded on the right; None: no model reads them.
    columns: of the data, a value per response. In a distributed launch the functions see this process's responses only.
    """
    pooled = None
    if states is not None:
        pooled = response_features(states, samples.prompt_lengths, text_lengths(samples))
    models = (single, ensemble)
    reads_text = bool(functions) or any(model.trunks for model in models)
    tokens = samples.lists() if reads_text else []
    texts = [decode(language, row) for row in tokens]
    alone, several = read_by(models, pooled, asked, texts, microbatch_size)
    values = function_values(functions, asked, texts, tokens, samples.finished.tolist(), columns)
    proxy = alone.mean[:, 0]
    return Judgement(proxy, several, {path: value.to(proxy.device) for path, value in values.items()})


def reward_metrics(judgement: Judgement) -> Metrics:
    """Return what a batch's scores say on average: proxy, nominal, worst, spread, each head's share, each function."""
    single, scores, functions = judgement
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
