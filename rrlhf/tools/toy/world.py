"""The toy's world: gold rewards and labels on part of them, what reward models learn of it, and exact policies.

With 8 responses the expectation over a policy's samples is a sum, so there is no sampling noise and PPO would only
approximate what is computed here.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from rrlhf.config import Fit
from rrlhf.losses import gaussian_bradley_terry
from rrlhf.progress import track
from rrlhf.rewards.heads import Pairs, RewardHeads, fit
from rrlhf.robust import Scores

HIDDEN = 32  # units of a policy's layers
LEARNING_RATE = 0.01
EPOCHS = 300  # of the reward models
HEAD_HIDDEN = 16  # units of every head's network
SIGMA_FLOOR = 0.05
WEIGHT_DECAY = 0.1  # labels without noise ask for endless differences between rewards


class Worlds(NamedTuple):
    """Independent toy problems, one a seed; all of one shape."""

    gold: Tensor  # [seeds, prompts, responses], mean 0 and standard deviation 1 over the labelled cells
    labelled: Tensor  # [seeds, prompts, responses] bool: cells that occur in preferences


def make_worlds(seeds: int, prompts: int, responses: int, labelled: float, interaction: float) -> Worlds:
    """Draw gold rewards and choose which cells are labelled.

    gold = quality of the response + `interaction` * what this prompt makes of it, both standard normal: what was
    learned on some prompts helps on others, but does not say everything. Of every prompt's responses the share
    `labelled`, at least 2, is compared; the rest is the gap in coverage. World n depends on n alone.
    """
    compared = max(2, round(labelled * responses))
    gold, mask = [], []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        quality = torch.randn(responses, generator=generator)
        gold.append(quality + interaction * torch.randn(prompts, responses, generator=generator))
        order = torch.rand(prompts, responses, generator=generator).argsort(dim=1).argsort(dim=1)
        mask.append(order < compared)
    known = torch.stack(mask)
    return Worlds(standardise(torch.stack(gold), known), known)


def moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std [seeds, 1, 1, ...] over the mask of values [seeds, prompts, responses, ...]."""
    weight = mask.float().reshape(*mask.shape, *[1] * (values.dim() - 3))
    count = weight.sum((1, 2), keepdim=True)
    mean = (values * weight).sum((1, 2), keepdim=True) / count
    variance = ((values - mean) ** 2 * weight).sum((1, 2), keepdim=True) / (count - 1)
    return mean, variance.sqrt()


def standardise(values: Tensor, mask: Tensor) -> Tensor:
    """Return values with mean 0 and standard deviation 1 over each seed's mask."""
    mean, std = moments(values, mask)
    return (values - mean) / std


def optimum(reward: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return log pi for pi(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x), [..., prompts, responses].

    The maximum of E_pi[r] - beta KL(pi || pi_ref); reference: log pi_ref.
    """
    return (reference + reward / beta).log_softmax(dim=-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) in nats, averaged over prompts, of log-probabilities [..., prompts, responses]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)


def expected(reward: Tensor, log_policy: Tensor) -> Tensor:
    """Return E_pi[r], averaged over prompts, [...]."""
    return (log_policy.exp() * reward).sum(-1).mean(-1)


class Learned(NamedTuple):
    """What the reward models say of every cell, in units of each seed's labelled cells."""

    single: Tensor  # [seeds, prompts, responses]
    ensemble: Scores  # [seeds, prompts, responses, heads] each


def learn(worlds: Worlds, heads: int) -> Learned:
    """Train on every labelled pair of a prompt, without label noise.

    A head sees a prompt and a response as two one-hot vectors. All seeds and heads are heads of one training: a pair
    weighs nothing for the seeds in which it is not labelled, or is labelled the other way round. The ensemble's heads
    see a bootstrap sample of the pairs each; the single one sees all of them.
    """
    seeds, prompts, responses = worlds.gold.shape
    cells = torch.cartesian_prod(torch.arange(prompts), torch.arange(responses))
    features = torch.cat([torch.eye(prompts)[cells[:, 0]], torch.eye(responses)[cells[:, 1]]], dim=1)
    better, worse = (cells[:, 0, None] == cells[None, :, 0]).nonzero(as_tuple=True)
    gold, labelled = worlds.gold.flatten(1), worlds.labelled.flatten(1)
    counts = labelled[:, better] & labelled[:, worse] & (gold[:, better] > gold[:, worse])  # [seeds, pairs]
    weights = torch.cat([counts[:, None], _bootstrap(counts, heads)], dim=1)  # [seeds, 1 + heads, pairs]
    torch.manual_seed(0)
    model = RewardHeads(features.shape[1], seeds * (1 + heads), HEAD_HIDDEN, SIGMA_FLOOR)
    training = fit(
        model,
        lambda chosen, rejected, _: gaussian_bradley_terry(chosen, rejected),
        Pairs(features[better], features[worse]),
        weights.flatten(0, 1).T.float(),
        Fit(epochs=EPOCHS, pairs_per_batch=len(better), learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        accelerator=Accelerator(cpu=True),
        generator=torch.Generator().manual_seed(0),
    )
    for _ in track(training, EPOCHS, "toy: reward models"):
        pass
    with torch.no_grad():
        raw = model(features)
    mean, std, _ = raw.each(lambda part: part.T.unflatten(0, (seeds, -1)).unflatten(2, (prompts, -1)).movedim(1, -1))
    centre, scale = moments(mean, worlds.labelled)
    normalised, std = (mean - centre) / scale, std / scale
    return Learned(normalised[..., 0], Scores(normalised[..., 1:], std[..., 1:]))


def _bootstrap(counts: Tensor, heads: int) -> Tensor:
    """Return how often each head's sample holds a pair [seeds, heads, pairs]; samples are as large as the data."""
    samples = []
    for seed, labelled in enumerate(counts):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(labelled.float(), heads * int(labelled.sum()), replacement=True, generator=generator)
        samples.append(torch.nn.functional.one_hot(drawn.reshape(heads, -1), len(labelled)).sum(1))
    return torch.stack(samples)


def train(rewards: Tensor, beta: float, steps: int) -> Iterator[tuple[int, Tensor]]:
    """Maximise E_pi[r] - beta KL(pi || pi_ref) of every policy; yield each number of steps done with log pi.

    rewards: [seeds, arms, prompts, responses]. Policies are three-layer networks from a one-hot prompt to logits of the
    responses; those of a seed start from the same weights. First comes step 0, the start, which is the reference.
    """
    seeds, arms, prompts, responses = rewards.shape
    widths = (prompts, HIDDEN, HIDDEN, responses)
    weights = [_start(seeds, arms, wide, narrow) for wide, narrow in pairwise(widths)]
    biases = [torch.zeros(seeds, arms, 1, narrow, requires_grad=True) for narrow in widths[1:]]
    optimizer = torch.optim.Adam([*weights, *biases], lr=LEARNING_RATE)
    reference = _log_policy(weights, biases).detach()
    for step in range(steps + 1):
        log_policy = _log_policy(weights, biases)
        yield step, log_policy.detach()
        objective = expected(rewards, log_policy) - beta * kl(log_policy, reference)
        optimizer.zero_grad()
        (-objective.sum()).backward()
        optimizer.step()


def _start(seeds: int, arms: int, wide: int, narrow: int) -> Tensor:
    """Return weights [seeds, arms, wide, narrow] that depend on the seed alone."""
    each = [torch.randn(wide, narrow, generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    weights: Tensor = (torch.stack(each) * wide**-0.5)[:, None].repeat(1, arms, 1, 1)
    return weights.requires_grad_()


def _log_policy(weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """Return log pi, [seeds, arms, prompts, responses]."""
    states = weights[0] + biases[0]  # the product of one-hot prompts and a matrix is the matrix
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        states = states.tanh() @ weight + bias
    log_policy: Tensor = states.log_softmax(dim=-1)
    return log_policy
