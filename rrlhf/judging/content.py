"""How good a reward model is, as judging writes it and reports read it: plain shapes, in memory and in JSON.

A quantity that the data do not determine (a rank correlation with a constant, a temperature without an optimum) is
None.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """A mean with its standard error over n independent units; the error is NaN when n is 1."""

    mean: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Share(Measured):
    """A measured share with its 95 % interval (Wilson)."""

    low: float
    high: float


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs of which the model was about equally sure: how sure, and how often it was right, with its 95 % interval."""

    confidence: float  # mean of P(the likelier response wins)
    accuracy: float
    n: int
    low: float  # of the accuracy, for pairs that are independent
    high: float


@dataclass(frozen=True)
class Calibration:
    """How honest P(chosen wins) is; see rrlhf/judging/calibration.py for each formula."""

    ece: float
    mce: float
    brier: float
    nll: float  # nats
    temperature: float | None  # above 1: too sure of itself
    reliability: list[ReliabilityBin]


@dataclass(frozen=True)
class Coverage:
    """How often a central interval of a stated Gaussian held what it should: honest where share equals level."""

    level: float
    share: Measured


@dataclass(frozen=True)
class Heads:
    """What the heads of an ensemble say about each other, on the responses of the pairs, in normalised units."""

    accuracy: list[Share]  # of each head's mean
    correlation: list[list[float | None]]
    spread: Measured  # standard deviation between heads, mean over responses
    sigma: float  # stated standard deviation, mean over heads and responses
    coverage: list[Coverage]  # of the other heads' margins by N(margin_i, sigma_i^2)
    spread_warns: float | None  # rank correlation between the spread of a pair's margin and a wrong order
    sigma_warns: float | None  # the same of the stated standard deviation of the margin


@dataclass(frozen=True)
class RewardJudgement:
    """How well one reward model ranks pairs, and how honest it is about it."""

    name: str
    pairs: int
    prompts: int
    accuracy: dict[str, Share]  # by reading; a single head has one
    calibration: Calibration
    heads: Heads | None = None  # of an ensemble


@dataclass(frozen=True)
class GoldAgreement:
    """How an ensemble's beliefs about one policy's responses agree with the gold judge."""

    name: str  # of the policy
    rank_correlation: float | None  # between the heads' mean and gold
    coverage: list[Coverage]  # of standardised gold by the ensemble's Gaussian
    spread_warns: float | None  # rank correlation between the heads' spread and the absolute error
    sigma_warns: float | None
    overrated_auc: float | None = None  # chance that sigma is larger for an overrated response than for another


@dataclass(frozen=True)
class Robustness:
    """How a reward model ranks pairs under one kind of perturbation."""

    kind: str
    keeps_meaning: bool
    wins: Share  # P(chosen wins) when both responses are perturbed
    turned: Share  # how often the order differs from that of the texts as they are
    shift: Measured  # of the reward by the perturbation, in normalised units


@dataclass(frozen=True)
class SubsetAccuracy:
    """Accuracy on the subsets of a benchmark."""

    subsets: dict[str, Share]
    macro: Measured  # every subset counts the same
    micro: Share  # every prompt counts the same
