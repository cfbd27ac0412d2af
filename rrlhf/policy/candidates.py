"""The responses that best-of-n chooses among, with all that was said of them: one table, one row a response."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rrlhf.models.rollout import Response
from rrlhf.policy.judgement import Judgement
from rrlhf.policy.selection import chosen

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
    folder: Path, responses: Sequence[Response], texts: Sequence[str], scores: Judgement, reward: Tensor, n: int
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
