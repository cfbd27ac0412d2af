"""The gates: rules on numbers over prompts. A gate passes when the worse end of its interval does.

So an interval that is wide, for few prompts, passes nothing: what is not known is not good enough.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from torch import Tensor

from rrlhf.judging.calibration import correct, estimate, mean_interval, share_interval


class Gate(TypedDict):
    """One rule, and what was found; `low` and `high` are None where there is no interval."""

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


def wins(candidate: Tensor, opponent: Tensor) -> Tensor:
    """Return per prompt the share of pairs of responses that the candidate wins, ties counting half, [prompts].

    candidate, opponent: scores [prompts, samples] of responses to the same prompts; every sample of one meets every
    sample of the other, so the order of sampling is nothing.
    """
    return correct(candidate[:, :, None] - opponent[:, None, :]).mean((1, 2))


def win_rate(candidate: Tensor, opponent: Tensor, least: float, level: float) -> Gate:
    """Ask for a win rate whose interval (Wilson, for as many units as the spread over prompts speaks of) is high."""
    found = estimate(wins(candidate, opponent))
    low, high = share_interval(found, level)
    passed = found.n > 1 and low >= least
    rule = f"the interval's lower end is at least {least:g}"
    return _gate("win_rate", rule, found.mean, (low, high), found.n, passed)


def at_most(name: str, values: Tensor, most: float, level: float) -> Gate:
    """Ask that the mean of values [prompts] is at most so much."""
    found = estimate(values)
    interval = mean_interval(found, level)
    rule = f"the interval's upper end is at most {most:g}"
    return _gate(name, rule, found.mean, interval, found.n, interval.high <= most)


def within(name: str, values: Tensor, most: float, level: float) -> Gate:
    """Ask that the mean of values [prompts] is at most so far from 0, on either side."""
    found = estimate(values)
    interval = mean_interval(found, level)
    passed = -most <= interval.low and interval.high <= most
    rule = f"the interval lies between {-most:g} and {most:g}"
    return _gate(name, rule, found.mean, interval, found.n, passed)


def clean(faults: list[str]) -> Gate:
    """Ask that the audit found nothing."""
    rule = "; ".join(faults) if faults else "files, records and registry agree, all the way up"
    return _gate("audit", rule, None, None, 0, not faults)


def gates(
    candidate: Read,
    opponent: Read,
    start: Read,
    *,
    level: float,
    min_win_rate: float | None,
    max_kl: float | None,
    max_sigma: float | None,
    max_length_drift: float | None,
    max_repetition: float | None,
) -> list[Gate]:
    """Return every gate that has a limit. `start` is the SFT model; drifts are paired by prompt.

    Length drift is the change of words as a share of the start's mean.
    """
    found: list[Gate] = []
    if min_win_rate is not None:
        found.append(win_rate(candidate.judged, opponent.judged, min_win_rate, level))
    if max_kl is not None:
        found.append(at_most("kl", candidate.kl.mean(1), max_kl, level))
    if max_sigma is not None:
        found.append(at_most("sigma", (candidate.sigma.mean(1) - start.sigma.mean(1)), max_sigma, level))
    if max_length_drift is not None:
        usual = start.words.mean().clamp(min=1e-9)
        found.append(within("length", (candidate.words.mean(1) - start.words.mean(1)) / usual, max_length_drift, level))
    if max_repetition is not None:
        rise = candidate.repetition.mean(1) - start.repetition.mean(1)
        found.append(at_most("repetition", rise, max_repetition, level))
    return found


def in_words(gate: Gate) -> str:
    """Say on one line what was asked and found."""
    if gate["value"] is None:
        return gate["rule"]
    interval = "" if gate["low"] is None or gate["high"] is None else f" [{gate['low']:.3f}, {gate['high']:.3f}]"
    return f"{gate['value']:.3f}{interval} over {gate['n']} prompts; passes when {gate['rule']}"


def _gate(
    name: str, rule: str, value: float | None, interval: tuple[float, float] | None, n: int, passed: bool
) -> Gate:
    low, high = interval or (None, None)
    known = [None if number is None or number != number else number for number in (value, low, high)]
    return {"name": name, "rule": rule, "value": known[0], "low": known[1], "high": known[2], "n": n, "passed": passed}
