"""How good a reward model is, as JSON writes it: the words that judging fills in and reports read.

A quantity that the data do not determine (a rank correlation with a constant, a temperature without an optimum) is
null.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Measured(TypedDict):
    """A mean with its standard error over n independent units; the error is NaN when n is 1."""

    mean: float
    stderr: float
    n: int


class Share(Measured):
    """A measured share with its 95 % interval (Wilson)."""

    low: float
    high: float


class ReliabilityBin(TypedDict):
    """Pairs of which the model was about equally sure; the interval is that of the accuracy, 95 %."""

    confidence: float
    accuracy: float
    n: int
    low: float
    high: float


class Calibration(TypedDict):
    """How honest P(chosen wins) is; see rrlhf/judging/calibration.py for each formula."""

    ece: float
    mce: float
    brier: float
    nll: float  # nats
    temperature: float | None  # above 1: too sure of itself
    reliability: list[ReliabilityBin]


class Coverage(TypedDict):
    """How often a central interval of a stated Gaussian held what it should: honest where share equals level."""

    level: float
    share: Measured


class SigmaBinRow(TypedDict):
    """Responses with about the same stated standard deviation, and the root mean square error that was found."""

    sigma: float
    error: float
    n: int


class Heads(TypedDict):
    """What the heads of an ensemble say about each other, on the responses of the pairs, in normalised units."""

    accuracy: list[Share]  # of each head's mean
    correlation: list[list[float | None]]
    spread: Measured  # standard deviation between heads, mean over responses
    sigma: float  # stated standard deviation, mean over heads and responses
    coverage: list[Coverage]  # of the other heads' margins by N(margin_i, sigma_i^2)
    spread_warns: float | None  # rank correlation between the spread of a pair's margin and a wrong order
    sigma_warns: float | None  # the same of the stated standard deviation of the margin


class RewardJudgement(TypedDict):
    """How well one reward model ranks pairs, and how honest it is about it."""

    name: str
    pairs: int
    prompts: int
    accuracy: dict[str, Share]  # by reading; a single head has one
    calibration: Calibration
    heads: NotRequired[Heads]  # of an ensemble


class GoldAgreement(TypedDict):
    """How an ensemble's beliefs about one policy's responses agree with the gold judge."""

    name: str  # of the policy
    rank_correlation: float | None  # between the heads' mean and gold
    coverage: list[Coverage]  # of standardised gold by the ensemble's Gaussian
    sigma_bins: list[SigmaBinRow]  # stated standard deviation against the error to standardised gold
    spread_warns: float | None  # rank correlation between the heads' spread and the absolute error
    sigma_warns: float | None
    overrated_auc: float | None  # chance that sigma is larger for an overrated response than for another


class Robustness(TypedDict):
    """How a reward model ranks pairs under one kind of perturbation."""

    kind: str
    keeps_meaning: bool
    wins: Share  # P(chosen wins) when both responses are perturbed
    turned: Share  # how often the order differs from that of the texts as they are
    shift: Measured  # of the reward by the perturbation, in normalised units


class SubsetAccuracy(TypedDict):
    """Accuracy on the subsets of a benchmark."""

    subsets: dict[str, Share]
    macro: Measured  # every subset counts the same
    micro: Share  # every prompt counts the same
