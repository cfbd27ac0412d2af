"""What the reward models say about a rollout, and what an arm's policy is paid for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from rrlhf.config import Arm
from rrlhf.models import LanguageModel, decode
from rrlhf.reward_models.scoring import RewardModel, read_by
from rrlhf.robust import AGGREGATIONS, Scores, head_spread, most_confident, nominal_reward, worst_reward
from rrlhf.rollout import Samples, response_features, text_lengths
from rrlhf.types import Message, Metrics


class Judgement(NamedTuple):
    """What the reward models say about a batch of responses."""

    single: Tensor  # [batch] normalised score of the single head: the proxy
    ensemble: Scores  # [batch, heads] normalised


def arm_reward(arm: Arm, engine: Accelerator) -> Callable[[Judgement], Tensor]:
    """Return the reward [batch] that an arm's policy sees; all processes' responses count as one batch."""
    if arm.reward == "single":
        return lambda judgement: judgement.single
    aggregate = AGGREGATIONS[str(arm.reward)]

    def reward(judgement: Judgement) -> Tensor:
        mean, std = judgement.ensemble
        own = slice(engine.process_index * len(mean), (engine.process_index + 1) * len(mean))
        everyone = Scores(engine.gather(mean), engine.gather(std))
        return aggregate(everyone, **arm.settings)[own]

    return reward


def judge(
    samples: Samples,
    single: RewardModel,
    ensemble: RewardModel,
    *,
    reward_layer: int | None,
    language: LanguageModel,
    asked: Sequence[list[Message]],
    microbatch_size: int,
) -> Judgement:
    """Score the responses, from the policy's own pass where a reward model shares its layers, else from their text."""
    pooled = None
    if reward_layer is not None:
        pooled = response_features(samples.states[reward_layer], samples.prompt_lengths, text_lengths(samples))
    models = (single, ensemble)
    reads_text = any(model.trunks for model in models)
    texts = [decode(language, row) for row in samples.lists()] if reads_text else []
    alone, several = read_by(models, pooled, asked, texts, microbatch_size)
    return Judgement(alone.mean[:, 0], several)


def reward_metrics(judgement: Judgement) -> Metrics:
    """Return what a batch's scores say on average: proxy, nominal, worst, spread, and each head's share of it."""
    single, scores = judgement
    metrics = {
        "proxy": single.mean().item(),
        "nominal": nominal_reward(scores).mean().item(),
        "worst": worst_reward(scores).mean().item(),
        "spread": head_spread(scores).mean().item(),
    }
    counts = torch.bincount(most_confident(scores), minlength=scores.mean.shape[1])
    for head, (mean, count) in enumerate(zip(scores.mean.mean(0).tolist(), counts.tolist(), strict=True)):
        metrics[f"head_{head}"] = mean
        metrics[f"head_{head}_nominal"] = count / len(scores.mean)
    return metrics
