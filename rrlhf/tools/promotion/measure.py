"""Both versions and the model they started from, sampled on the evaluation prompts and read by the same judges."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from rrlhf.config import Model, Params
from rrlhf.data.tables import read_table
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.policy.reading import Reading, load_judges, read_responses, repetition, sample_responses
from rrlhf.robust import mean_reward
from rrlhf.tools.promotion.gates import Gate, Read, gates


class Yardstick(NamedTuple):
    """What every version of one comparison is measured with: data, start and reward models."""

    data: Path
    sft: Artifact
    reward: Artifact
    ensemble: Artifact
    model: Model


class Measured(NamedTuple):
    """What the gates found, and by whose judgement."""

    gates: list[Gate]
    judge: str
    prompts: int
    means: dict[str, dict[str, float]]  # by version and quantity


def measure(yardstick: Yardstick, candidate: Path, opponent: Path, params: Params) -> Measured:
    """Sample, judge, and hold the numbers against the gates of params.

    Responses are judged by gold where the prompts have topics, else by the mean of the ensemble's heads, which are
    no independent judge of a policy that they trained. The prompts are those that no stage trains on.
    """
    rows, model = read_table(yardstick.data, "evaluate"), yardstick.model
    has_gold = rows[0]["topic"] is not None
    start, reward, ensemble = (each.path for each in (yardstick.sft, yardstick.reward, yardstick.ensemble))
    judges = load_judges(model, params.gold, start, reward, ensemble, [], has_gold=has_gold)
    folders = {"candidate": candidate, "opponent": opponent, "start": start}
    reads: dict[Path, Read] = {}
    for name, folder in folders.items():
        if folder not in reads:
            responses = sample_responses(folder, name, rows, model, params.evaluate, params.seed)
            reads[folder] = _read(read_responses(judges, responses, rows, model, params.evaluate, name))
    found = gates(reads[candidate], reads[opponent], reads[start], params.gates)
    means = {
        name: {quantity: values.double().mean().item() for quantity, values in reads[folder]._asdict().items()}
        for name, folder in folders.items()
    }
    return Measured(found, "gold" if has_gold else "mean of the ensemble's heads", len(rows), means)


def _read(reading: Reading) -> Read:
    judged = mean_reward(reading.scores) if reading.gold is None else reading.gold
    repeated = torch.tensor([repetition(text) for text in reading.texts])
    columns = (judged, reading.kl, reading.scores.std.mean(1), reading.words, repeated)
    return Read(*(column.double().view(-1, reading.per_prompt) for column in columns))
