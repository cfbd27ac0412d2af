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
from rrlhf.judging.calibration import Interval, correct, estimate, group_means, mean_interval, share_interval
from rrlhf.judging.chat import Comparisons
from rrlhf.judging.content import Measured
from rrlhf.pipeline.artifacts import Artifact
from rrlhf.policy.reading import Asked, Reading, load_judges, read_responses, repetition, sample_responses, wins_over
from rrlhf.robust import mean_reward

ROLES = {"candidate": "candidate", "opponent": "opponent", "start": "sft"}  # who answers, by whose model


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

    judged: Tensor  # the user's judge, if it is a reward model; else gold, or what stands for it
    kl: Tensor  # log(pi / pi_ref), nats per response
    sigma: Tensor  # standard deviation of the reward
    words: Tensor
    repetition: Tensor  # share of words that occurred before


def measure(data: Path, models: Mapping[str, Artifact], params: Params) -> dict[str, Any]:
    """Sample, judge, and hold the numbers against the gates of params; return what a decision keeps of that, as JSON.

    models: "candidate", "opponent", their start "sft", and "reward" and "ensemble", which measure. Responses are judged
    by `evaluate.judge` where there is one; by gold where the prompts have topics; else by the mean of the ensemble's
    heads, which are no independent judge of a policy that they trained. The prompts are those that no stage trains on.
    """
    model = Model.model_validate(models["candidate"].manifest["document"]["params"]["model"])
    asked = Asked(read_table(data, "evaluate"), model, params.evaluate, params.seed)
    judges = load_judges(asked, params.gold, {name: models[name].path for name in ("sft", "reward", "ensemble")}, [])
    folders = {name: models[of].path for name, of in ROLES.items()}
    readings: dict[Path, Reading] = {}
    for name, folder in folders.items():
        if folder not in readings:
            readings[folder] = read_responses(judges, asked, sample_responses(asked, folder, name), name)
    reads = {name: _read(readings[folder]) for name, folder in folders.items()}
    if isinstance(judges.own, Comparisons):
        mine, theirs = readings[folders["candidate"]], readings[folders["opponent"]]
        won = group_means(*wins_over(judges, asked, mine, theirs, "candidate"))
    else:
        won = wins(reads["candidate"].judged, reads["opponent"].judged)
    by_default = "gold" if asked.has_gold else "mean of the ensemble's heads"
    return {
        "gates": gates(reads["candidate"], won, reads["start"], params.gates),
        "means": {
            name: {quantity: values.double().mean().item() for quantity, values in read._asdict().items()}
            for name, read in reads.items()
        },
        "judge": judges.own.told().name if judges.own else by_default,
        "prompts": len(asked.rows),
    }


def _read(reading: Reading) -> Read:
    known = (judged for judged in (reading.own, reading.gold) if judged is not None)
    judged = next(known, mean_reward(reading.scores))
    repeated = torch.tensor([repetition(text) for text in reading.texts])
    columns = (judged, reading.kl, reading.scores.std.mean(1), reading.words, repeated)
    return Read(*(column.double().view(-1, reading.per_prompt) for column in columns))


def gates(candidate: Read, won: Tensor, start: Read, limits: Gates) -> list[Gate]:
    """Return every gate that has a limit. `start` is the SFT model; drifts are paired by prompt.

    won: of the comparisons with the opponent, the share that the candidate won, [prompts]. Length drift is the change
    of words as a share of the start's mean.
    """
    found: list[Gate] = []
    level = limits.level
    if limits.min_win_rate is not None:
        found.append(win_rate(won, limits.min_win_rate, level))
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


def win_rate(won: Tensor, least: float, level: float) -> Gate:
    """Ask for a win rate whose interval (Wilson, for as many units as the spread over prompts speaks of) is high."""
    found = estimate(won)
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
