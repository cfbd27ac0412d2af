"""Best of n: sample n responses and keep the one that a proxy scores highest. What that does, for every n at once.

Responses that were chosen among are kept in one table, with all that was said of them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rrlhf.models.rollout import Response
from rrlhf.policy.reward import RewardScores

FILE = "candidates.parquet"
SCHEMA = pa.schema(
    {
        "prompt": pa.int32(),  # row of the evaluation table
        "text": pa.string(),
        "tokens": pa.list_(pa.int32()),
        "finished": pa.bool_(),
        "logprob": pa.float64(),  # under the model that was sampled, nats
        "reward": pa.float64(),  # what decides
        "proxy": pa.float64(),  # the single head
        "heads": pa.list_(pa.float64()),  # each head's mean
        "sigmas": pa.list_(pa.float64()),  # and standard deviation
        "chosen": pa.bool_(),
    }.items()
)


def best_of_n_curve(proxy: Tensor, values: Tensor, n_max: int) -> Tensor:
    """Return the expected value of the best of n by proxy for n = 1 to n_max, [..., n_max] float64.

    proxy, values: [..., samples], independent samples of one prompt in the last dimension. With samples sorted by
    proxy, i = 1 the lowest, the estimate is sum_i C(i-1, n-1) / C(samples, n) * value_i: the mean over all subsets of
    n samples, so it is unbiased (Nakano et al. 2021, arXiv 2112.09332, appendix; used by Gao et al. 2022, arXiv
    2210.10760). Among equal proxies every one is the best equally often: each counts as their mean.

    Raises ValueError when n_max is above the number of samples.
    """
    samples = proxy.shape[-1]
    if not 1 <= n_max <= samples:
        raise ValueError(f"the best of {n_max} cannot be told from {samples} samples: n is 1 to {samples}")
    ordered, order = proxy.sort(dim=-1)
    by_rank = values.double().gather(-1, order)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        by_rank = _shared_among_ties(ordered, by_rank)
    return by_rank @ best_of_n_weights(samples, n_max).T.to(by_rank.device)


def best_of_n_weights(samples: int, n_max: int) -> Tensor:
    """Return P(the sample of rank i is the best of n) = C(i-1, n-1) / C(samples, n), [n_max, samples] float64.

    By recursion in n, w_n(i) = w_{n-1}(i) * (i-n+1) / (n-1) * n / (samples-n+1): no factorial overflows.
    """
    rank = torch.arange(1, samples + 1, dtype=torch.float64)
    n = torch.arange(2, n_max + 1, dtype=torch.float64)[:, None]
    step = (rank - n + 1).clamp(min=0) / (n - 1) * n / (samples - n + 1)
    return torch.cat([torch.full((1, samples), 1 / samples, dtype=torch.float64), step]).cumprod(dim=0)


def chosen(proxy: Tensor) -> Tensor:
    """Return the index of the highest proxy [..., n] in the last dimension, the first of equal ones, [...].

    Samples are exchangeable, so the first of equal ones is any of them.
    """
    highest = proxy == proxy.amax(dim=-1, keepdim=True)
    return highest.int().argmax(dim=-1)


def best_of_n_kl(n: int) -> float:
    """Return log n - (n - 1) / n, in nats: an upper bound of KL(best of n || the model that is sampled).

    Equal to it where no two responses have the same score; where few responses are likely, as for short ones, the
    true KL is lower (Beirami et al. 2024, arXiv 2401.01879, theorem 1).
    """
    return math.log(n) - (n - 1) / n


def curve_points(n_max: int, most: int = 48) -> list[int]:
    """Return the n at which a curve from 1 to n_max is told: at most about `most`, evenly spaced on a log axis."""
    return sorted({round(n_max ** (i / most)) for i in range(most + 1)})


def _shared_among_ties(ordered: Tensor, values: Tensor) -> Tensor:
    """Replace each value by the mean over the run of equal proxies that it stands in, both [..., samples]."""
    run = torch.nn.functional.pad((ordered[..., 1:] != ordered[..., :-1]).cumsum(-1), (1, 0))
    sums = torch.zeros_like(values).scatter_add(-1, run, values)
    counts = torch.zeros_like(values).scatter_add(-1, run, torch.ones_like(values))
    return (sums / counts.clamp(min=1)).gather(-1, run)


class Candidates(NamedTuple):
    """Responses as they are read again; those of one prompt lie side by side, as many for each."""

    responses: list[Response]
    texts: list[str]
    reward: Tensor  # [prompts, samples]
    chosen: list[int]  # rows of the chosen responses

    @property
    def best(self) -> list[Response]:
        """The chosen responses, as many for every prompt."""
        return [self.responses[i] for i in self.chosen]


def choose(reward: Tensor, n: int) -> Tensor:
    """Return a mask [prompts, samples] of the best of every n samples [prompts, samples], in the order of sampling.

    What is left over behind the last n competes for nothing.
    """
    prompts, samples = reward.shape
    groups = samples // n
    best = chosen(reward[:, : groups * n].view(prompts, groups, n))
    index = best + n * torch.arange(groups)
    return torch.zeros_like(reward, dtype=torch.bool).scatter(1, index, True)


def write_candidates(
    folder: Path, responses: Sequence[Response], texts: Sequence[str], scores: RewardScores, reward: Tensor, n: int
) -> None:
    """Write the table, with the best of every n; reward: [prompts, samples], as all else has it by response."""
    columns = {
        "prompt": (torch.arange(reward.numel()) // reward.shape[1]).tolist(),
        "text": texts,
        "tokens": [response.tokens for response in responses],
        "finished": [response.finished for response in responses],
        "logprob": [response.logprob for response in responses],
        "reward": reward.flatten().tolist(),
        "proxy": scores.single.tolist(),
        "heads": scores.ensemble.mean.tolist(),
        "sigmas": scores.ensemble.std.tolist(),
        "chosen": choose(reward, n).flatten().tolist(),
    }
    pq.write_table(pa.table(columns, schema=SCHEMA), folder / FILE)


def read_candidates(folder: Path) -> Candidates:
    """Read the table that `write_candidates` wrote."""
    rows = pq.read_table(folder / FILE).to_pylist()
    reward = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    return Candidates(
        responses=[Response(row["tokens"], row["finished"], row["logprob"]) for row in rows],
        texts=[row["text"] for row in rows],
        reward=reward.view(rows[-1]["prompt"] + 1, -1),
        chosen=[i for i, row in enumerate(rows) if row["chosen"]],
    )
