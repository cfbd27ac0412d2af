"""Labelled questions to judge a reward model on, from local files; in the format of RewardBench also by subset.

RewardBench (Lambert et al. 2024, arXiv 2403.13787) names a subset for every pair of a chosen and a rejected response.
RewardBench 2 (Malik et al. 2025, arXiv 2506.01937) asks about several responses at once, in lists.
"""

import itertools
from collections.abc import Sequence
from math import fsum
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from rrlhf.data.files import rows_of, source_files
from rrlhf.data.load import Place, Rejected, good_rows, prompt_hash, refuse_bad_rows, refuse_repetition
from rrlhf.data.rows import FORMATS, Format, Row, RowError, plain_row, subset_of
from rrlhf.judging.calibration import measured_share
from rrlhf.judging.content import Measured, SubsetAccuracy
from rrlhf.located import UsageError, did_you_mean
from rrlhf.types import Preference

BENCH = "rewardbench"
PAIR_FORMATS = FORMATS | {BENCH: Format(("prompt", "chosen", "rejected", "subset"), (), plain_row, "filtered")}


class LabelledPairs(NamedTuple):
    """Pairs in the order of their files, which of them make up a question, its subset, and the rows left out."""

    source: str
    pairs: list[Preference]
    questions: list[int]  # of each pair, its question; one pair a question but for lists of responses
    subsets: list[str]  # empty, or one a question
    rejected: list[Rejected]


def load_pairs(data: Path, format: str, *, max_rejected: float, limit: int | None) -> LabelledPairs:
    """Read the first `limit` good rows of a file, a folder or the files that match a pattern.

    Raises UsageError when there is no such file. Raises ValueError when one cannot be read, lacks a column or holds no
    row, and with rules and examples (file, line) when more than the share `max_rejected` of the rows is bad.
    """
    if format not in PAIR_FORMATS:
        raise UsageError(f"unknown format {format!r}{did_you_mean(format, PAIR_FORMATS)}")
    try:
        files = source_files(str(data))
    except ValueError as error:
        raise UsageError(f"--data {error}") from None
    layout, rejected, columns = PAIR_FORMATS[format], list[Rejected](), dict[str, None]()
    seen: dict[str, dict[bytes, Place]] = {}  # by subset: one question may stand in two

    def question(row: Row, place: Place) -> tuple[str, list[Preference]]:
        pairs = _pairs(row, layout) if format == BENCH else [layout.read(row)]
        subset = subset_of(row) if format == BENCH else ""
        answers = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
        refuse_repetition(pairs[0].prompt, *answers, place, seen.setdefault(subset, {}))
        return subset, pairs

    found = [*itertools.islice(good_rows(rows_of(files, layout), rejected, columns, question), limit)]
    refuse_bad_rows(str(data), rejected, len(found), columns, layout, max_rejected, "--max-rejected")
    return LabelledPairs(
        str(data),
        pairs=[pair for _, pairs in found for pair in pairs],
        questions=[number for number, (_, pairs) in enumerate(found) for _ in pairs],
        subsets=[subset for subset, _ in found if format == BENCH],
        rejected=rejected,
    )


def _pairs(row: Row, layout: Format) -> list[Preference]:
    """Return every pair of a chosen and a rejected response of a row, which may list several of each."""
    several = itertools.product(*(_several(row, name) for name in ("chosen", "rejected")))
    return [layout.read({**row, "chosen": chosen, "rejected": rejected}) for chosen, rejected in several]


def _several(row: Row, name: str) -> list[object]:
    value = row.get(name)
    if value == []:
        raise RowError("empty", f"{name} has no response")
    if isinstance(value, list) and all(isinstance(response, str) for response in value):
        return value
    return [value] if name in row else []


def question_wins(margins: Tensor, questions: Sequence[int]) -> Tensor:
    """Return how far each question was answered right, [questions]: 1 where every chosen response beats every other.

    margins: [pairs], score of the chosen minus score of the rejected response. Where the best rejected responses tie
    with the worst chosen one, each of them might be picked: 1 / (1 + their number), as RewardBench 2 counts.
    """
    index = torch.tensor(questions, device=margins.device)
    count = int(index.max()) + 1
    least = margins.new_full((count,), torch.inf).scatter_reduce(0, index, margins, "amin")
    tied = torch.zeros(count, dtype=torch.double, device=margins.device).index_add(0, index, (margins == 0).double())
    return (least > 0).double() + (least == 0).double() / (1 + tied)


def prompt_numbers(pairs: Sequence[Preference]) -> Tensor:
    """Return a number for every pair, [pairs]; equal where the prompts count as the same."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(prompt_hash(pair.prompt), len(numbers)) for pair in pairs])


def accuracy_by_subset(wins: Tensor, subsets: Sequence[str], prompts: Tensor) -> SubsetAccuracy:
    """Return the accuracy of wins [questions] (1, or less on a tie) on every subset, and the two ways to average it."""
    of = {name: [i for i, subset in enumerate(subsets) if subset == name] for name in sorted(set(subsets))}
    found = {name: measured_share(wins[inside], prompts[inside]) for name, inside in of.items()}
    parts = list(found.values())
    stderr = fsum(part.stderr**2 for part in parts) ** 0.5 / len(parts)
    macro = Measured(fmean(part.mean for part in parts), stderr, len(parts))
    return SubsetAccuracy(found, macro, measured_share(wins, prompts))
