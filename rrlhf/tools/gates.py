"""The gates: rules on numbers over prompts, for a version, its opponent and their start, read by the same judges.

A gate passes when the worse end of its interval does. So an interval that is wide, for few prompts, passes nothing:
what is not known is not good enough.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from rrlhf.config import Gates, Model, Params
from rrlhf.data.tables import read_table
from rrlhf.judging.calibration import Interval, correct, estimate, mean_interval, share_interval
from rrlhf.judging.content import Measured
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.policy.reading import Reading, load_judges, read_responses, repetition, sample_responses
from rrlhf.robust import mean_reward


class Gate(TypedDict):
    """One rule, and what was found; a number is None where there is none."""

    name: str
    rule: str  # in words
    value: float | None
    low: float | None
    high: float | None
    n: int  # prompts
    passed: bool


class Read(NamedTuple):
    """What the judges say about one policy's responses, each [prompts, samples]."""

    judged: Tensor  # gold, or what stands for it
    kl: Tensor  # log(pi / pi_ref), nats per response
    sigma: Tensor  # standard deviation of the reward
    words: Tensor
    repetition: Tensor  # share of words that occurred before


def measure(data: Path, models: Mapping[str, Artifact], params: Params) -> dict[str, Any]:
    """Sample, judge, and hold the numbers against the gates of params; return what a decision keeps of that, as JSON.

    models: "candidate", "opponent", their start "sft", and "reward" and "ensemble", which measure. Responses are judged
    by gold where the prompts have topics, else by the mean of the ensemble's heads, which are no independent judge of a
    policy that they trained. The prompts are those that no stage trains on.
    """
    rows = read_table(data, "evaluate")
    has_gold = rows[0]["topic"] is not None
    model = Model.model_validate(models["candidate"].manifest["document"]["params"]["model"])
    start, reward, ensemble = (models[name].path for name in ("sft", "reward", "ensemble"))
    judges = load_judges(model, params.gold, start, reward, ensemble, [], has_gold=has_gold)
    folders = {"candidate": models["candidate"].path, "opponent": models["opponent"].path, "start": start}
    reads: dict[Path, Read] = {}
    for name, folder in folders.items():
        if folder not in reads:
            responses = sample_responses(folder, name, rows, model, params.evaluate, params.seed)
            reads[folder] = _read(read_responses(judges, responses, rows, model, params.evaluate, name))
    return {
        "gates": gates(reads[folders["candidate"]], reads[folders["opponent"]], reads[start], params.gates),
        "means": {
            name: {quantity: values.double().mean().item() for quantity, values in reads[folder]._asdict().items()}
            for name, folder in folders.items()
        },
        "judge": "gold" if has_gold else "mean of the ensemble's heads",
        "prompts": len(rows),
    }


def _read(reading: Reading) -> Read:
    judged = mean_reward(reading.scores) if reading.gold is None else reading.gold
    repeated = torch.tensor([repetition(text) for text in reading.texts])
    columns = (judged, reading.kl, reading.scores.std.mean(1), reading.words, repeated)
    return Read(*(column.double().view(-1, reading.per_prompt) for column in columns))


def gates(candidate: Read, opponent: Read, start: Read, limits: Gates) -> list[Gate]:
    """Return every gate that has a limit. `start` is the SFT model; drifts are paired by prompt.

    Length drift is the change of words as a share of the start's mean.
    """
    found: list[Gate] = []
    level = limits.level
    if limits.min_win_rate is not None:
        found.append(win_rate(candidate.judged, opponent.judged, limits.min_win_rate, level))
    if limits.max_kl is not None:
        found.append(at_most("kl", candidate.kl.mean(1), limits.max_kl, level))
    if limits.max_sigma is not None:
        found.append(at_most("sigma", candidate.sigma.mean(1) - start.sigma.mean(1), limits.max_sigma, level))
    if limits.max_length_drift is not None:
        drift = (candidate.words.mean(1) - start.words.mean(1)) / start.words.mean().clamp(min=1e-9)
        found.append(within("length", drift, limits.max_length_drift, level))
    if limits.max_repetition is not None:
        rise = candidate.repetition.mean(1) - start.repetition.mean(1)
        found.append(at_most("repetition", rise, limits.max_repetition, level))
    return found


def wins(candidate: Tensor, opponent: Tensor) -> Tensor:
    """Return per prompt the share of pairs of responses that the candidate wins, ties counting half, [prompts].

    candidate, opponent: scores [prompts, samples] of responses to the same prompts; every sample of one meets every
    sample of the other, so the order of sampling is nothing.
    """
    return correct(candidate[:, :, None] - opponent[:, None, :]).mean((1, 2))


def win_rate(candidate: Tensor, opponent: Tensor, least: float, level: float) -> Gate:
    """Ask for a win rate whose interval (Wilson, for as many units as the spread over prompts speaks of) is high."""
    found = estimate(wins(candidate, opponent))
    interval = share_interval(found, level)
    passed = found.n > 1 and interval.low >= least
    return _gate("win_rate", f"the interval's lower end is at least {least:g}", found, interval, passed)


def at_most(name: str, values: Tensor, most: float, level: float) -> Gate:
    """Ask that the mean of values [prompts] is at most so much."""
    found = estimate(values)
    interval = mean_interval(found, level)
    return _gate(name, f"the interval's upper end is at most {most:g}", found, interval, interval.high <= most)


def within(name: str, values: Tensor, most: float, level: float) -> Gate:
    """Ask that the mean of values [prompts] is at most so far from 0, on either side."""
    found = estimate(values)
    interval = mean_interval(found, level)
    passed = -most <= interval.low and interval.high <= most
    return _gate(name, f"the interval lies between {-most:g} and {most:g}", found, interval, passed)


def _gate(name: str, rule: str, found: Measured, interval: Interval, passed: bool) -> Gate:
    value, low, high = (None if math.isnan(number) else number for number in (found.mean, *interval))
    return {"name": name, "rule": rule, "value": value, "low": low, "high": high, "n": found.n, "passed": passed}


def clean(faults: list[str]) -> Gate:
    """Ask that the audit found nothing."""
    rule = "; ".join(faults) if faults else "files, records and registry agree, all the way up"
    return {"name": "audit", "rule": rule, "value": None, "low": None, "high": None, "n": 0, "passed": not faults}


def in_words(gate: Gate) -> str:
    """Say on one line what was asked and found."""
    if gate["value"] is None:
        return gate["rule"]
    interval = "" if gate["low"] is None or gate["high"] is None else f" [{gate['low']:.3f}, {gate['high']:.3f}]"
    return f"{gate['value']:.3f}{interval} over {gate['n']} prompts; passes when {gate['rule']}"
