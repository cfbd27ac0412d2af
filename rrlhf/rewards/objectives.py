"""What reward heads are trained to: the losses of losses.py, put together as the settings say."""

from collections.abc import Callable

import torch
from torch import Tensor

from rrlhf.config import HeadTraining, Member
from rrlhf.losses import (
    centring,
    dro_weights,
    gaussian_bradley_terry,
    gaussian_nll,
    reparameterised_mse,
    smoothed,
)
from rrlhf.rewards.heads import Pairs, RewardHeads
from rrlhf.robust import Scores, certain

# Maps raw scores of chosen and rejected responses, and the rows' index, to a loss [batch, heads].
PairLoss = Callable[[Scores, Scores, Tensor], Tensor]


def preference_loss(settings: HeadTraining) -> PairLoss:
    """Return the Bradley-Terry loss with the settings' margin, smoothing, centring and weights of the worst case."""

    def loss(chosen: Scores, rejected: Scores, index: Tensor) -> Tensor:
        error = gaussian_bradley_terry(chosen, rejected, settings.margin)
        if settings.label_smoothing:
            flipped = gaussian_bradley_terry(rejected, chosen, settings.margin)
            error = smoothed(error, flipped, settings.label_smoothing)
        if settings.dro_temperature is not None:
            error = error * dro_weights(error, settings.dro_temperature, settings.dro_cap)
        if settings.centring:
            error = error + settings.centring * centring(chosen.mean, rejected.mean)
        return error

    return loss


def single_loss(settings: HeadTraining) -> PairLoss:
    """Return the loss of a head that claims no uncertainty: `preference_loss` of its means alone."""
    loss = preference_loss(settings)
    return lambda chosen, rejected, index: loss(certain(chosen), certain(rejected), index)


def stage2_loss(settings: Member, single: RewardHeads, train: Pairs, generator: torch.Generator) -> PairLoss:
    """Return the loss that `ensemble.loss` and `ensemble.target` name.

    single: the head of stage 1 and train: the features that it reads, for the target stage1_reward.
    """
    if settings.loss == "bradley_terry":
        return preference_loss(settings)
    if settings.target == "stage1_reward":
        target_chosen = single.score(train.chosen).mean
        target_rejected = single.score(train.rejected).mean
    else:  # chosen and rejected lie one unit apart
        target_chosen = torch.full((len(train.chosen), 1), 0.5)
        target_rejected = -target_chosen

    def error(scores: Scores, target: Tensor) -> Tensor:
        if settings.loss == "gaussian_nll":
            return gaussian_nll(scores, target)
        noise = torch.randn(scores.mean.shape, generator=generator)
        return reparameterised_mse(scores, target, noise.to(target.device))

    def loss(chosen: Scores, rejected: Scores, index: Tensor) -> Tensor:
        high, low = (target.to(index.device)[index] for target in (target_chosen, target_rejected))
        return error(chosen, high) + error(rejected, low)

    return loss
