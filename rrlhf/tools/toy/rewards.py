"""The toy's learned rewards: a single head and a Bayesian ensemble, for all worlds in one training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from rrlhf.losses import gaussian_bradley_terry
from rrlhf.rewards.heads import Pairs, RewardHeads, fit
from rrlhf.robust import Scores
from rrlhf.tools.toy.problem import Worlds, moments
from rrlhf.types import Metrics

EPOCHS = 300
HIDDEN = 16  # units of every head's network
SIGMA_FLOOR = 0.05
LEARNING_RATE = 0.01
WEIGHT_DECAY = 0.1  # labels without noise ask for endless differences between rewards


class Learned(NamedTuple):
    """What the reward models say of every cell, in units of each seed's labelled cells."""

    single: Tensor  # [seeds, prompts, responses]
    ensemble: Scores  # [seeds, prompts, responses, heads] each


def learn(worlds: Worlds, heads: int, learned: list[Learned]) -> Iterator[Metrics]:
    """Train on every labelled pair of a prompt, without label noise; yield a row per epoch, append the result.

    A head sees a prompt and a response as two one-hot vectors. All seeds and heads are heads of one training: a pair
    weighs nothing for the seeds in which it is not labelled, or is labelled the other way round. The ensemble's heads
    see a bootstrap sample of the pairs each; the single one sees all of them.
    """
    seeds, prompts, responses = worlds.gold.shape
    cells = torch.cartesian_prod(torch.arange(prompts), torch.arange(responses))
    features = torch.cat(
        [torch.eye(prompts)[cells[:, 0]], torch.eye(responses)[cells[:, 1]]], dim=1
    )  # [cells, prompts + responses]
    better, worse = (cells[:, 0, None] == cells[None, :, 0]).nonzero(as_tuple=True)
    gold, labelled = worlds.gold.flatten(1), worlds.labelled.flatten(1)
    counts = labelled[:, better] & labelled[:, worse] & (gold[:, better] > gold[:, worse])  # [seeds, pairs]
    weights = torch.cat([counts[:, None], _bootstrap(counts, heads)], dim=1)  # [seeds, 1 + heads, pairs]
    torch.manual_seed(0)
    model = RewardHeads(features.shape[1], seeds * (1 + heads), HIDDEN, SIGMA_FLOOR)
    yield from fit(
        model,
        lambda chosen, rejected, _: gaussian_bradley_terry(chosen, rejected),
        Pairs(features[better], features[worse]),
        weights.flatten(0, 1).T.float(),
        accelerator=Accelerator(cpu=True),
        generator=torch.Generator().manual_seed(0),
        epochs=EPOCHS,
        pairs_per_batch=len(better),
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
    )
    with torch.no_grad():
        raw = model(features)
    mean, std, _ = raw.each(lambda part: part.T.unflatten(0, (seeds, -1)).unflatten(2, (prompts, -1)).movedim(1, -1))
    centre, scale = moments(mean, worlds.labelled)
    normalised, std = (mean - centre) / scale, std / scale
    learned.append(Learned(normalised[..., 0], Scores(normalised[..., 1:], std[..., 1:])))


def _bootstrap(counts: Tensor, heads: int) -> Tensor:
    """Return how often each head's sample holds a pair [seeds, heads, pairs]; samples are as large as the data."""
    samples = []
    for seed, labelled in enumerate(counts):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(labelled.float(), heads * int(labelled.sum()), replacement=True, generator=generator)
        sample = torch.nn.functional.one_hot(drawn.reshape(heads, -1), len(labelled)).sum(1)
        samples.append(sample)
    return torch.stack(samples)
