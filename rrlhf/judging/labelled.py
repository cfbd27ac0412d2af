"""Labelled pairs to judge a reward model on, from a local file; in the format of RewardBench also by subset.

RewardBench (Lambert et al. 2024, arXiv 2403.13787) names a subset for every pair of a prompt, a chosen and a
rejected response.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rrlhf.located import UsageError, did_you_mean
from rrlhf.preferences.data import Rejected, open_rows, refuse_repetition, require_columns
from rrlhf.preferences.rows import FIXES, FORMATS, Format, RowError, plain_row, subset_of
from rrlhf.types import Preference

if TYPE_CHECKING:
    from torch import Tensor

    from rrlhf.judging.content import SubsetAccuracy

PAIR_FORMATS = FORMATS | {"rewardbench": Format(("prompt", "chosen", "rejected", "subset"), plain_row, "filtered")}
MISTAKES_SHOWN = 50


class LabelledPairs(NamedTuple):
    """Pairs in the order of their file, the subset of each where the format has one, and the rows left out."""

    source: str
    pairs: list[Preference]
    subsets: list[str]  # empty, or one a pair
    rejected: list[Rejected]


def load_pairs(file: Path, format: str, *, max_rejected: float, limit: int | None) -> LabelledPairs:
    """Read the first `limit` good rows of a JSON Lines, JSON, CSV or Parquet file.

    Raises ValueError when the file cannot be read, lacks a column or holds no row, and with all mistakes at once (file,
    line, rule) when more than the share `max_rejected` of the rows read is bad.
    """
    if format not in PAIR_FORMATS:
        raise UsageError(f"unknown format {format!r}{did_you_mean(format, PAIR_FORMATS)}")
    if not file.is_file():
        raise UsageError(f"{file.absolute()}: no such file; name a .jsonl, .jsonl.gz, .json, .csv or .parquet file")
    layout = PAIR_FORMATS[format]
    try:
        name, rows = open_rows(str(file), None, layout)
    except ValueError as error:
        raise UsageError(str(error)) from None
    loaded = LabelledPairs(name, [], [], [])
    columns: dict[str, None] = {}
    seen: dict[str, dict[str, int]] = {}  # by subset: one pair may stand in two
    for line, row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            columns |= dict.fromkeys(row)
            pair, _ = layout.read(row)
            subset = subset_of(row) if "subset" in layout.fields else ""
            refuse_repetition(pair, line, seen.setdefault(subset, {}))
        except RowError as error:
            loaded.rejected.append(Rejected(name, line, error.rule, error.detail))
            continue
        loaded.pairs.append(pair)
        if "subset" in layout.fields:
            loaded.subsets.append(subset)
        if len(loaded.pairs) == limit:
            break
    if columns:
        require_columns(name, list(columns), layout)
    _refuse_bad_rows(loaded, max_rejected)
    return loaded


def prompt_numbers(pairs: Sequence[Preference]) -> Tensor:
    """Return a number for every pair, [pairs]; equal where the prompts count as the same."""
    import torch

    from rrlhf.preferences.data import prompt_hash

    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(prompt_hash(pair.prompt), len(numbers)) for pair in pairs])


def accuracy_by_subset(wins: Tensor, subsets: Sequence[str], prompts: Tensor) -> SubsetAccuracy:
    """Return the accuracy of wins [pairs] (1, or 0.5 on a tie) on every subset, and the two ways to average it."""
    import torch

    from rrlhf.judging.metrics import measured_share

    of = {
        name: torch.tensor([subset == name for subset in subsets], device=wins.device) for name in sorted(set(subsets))
    }
    found = {name: measured_share(wins[inside], prompts[inside]) for name, inside in of.items()}
    parts = list(found.values())
    stderr = sum(part["stderr"] ** 2 for part in parts) ** 0.5 / len(parts)
    mean = sum(part["mean"] for part in parts) / len(parts)
    return {
        "subsets": found,
        "macro": {"mean": mean, "stderr": stderr, "n": len(parts)},
        "micro": measured_share(wins, prompts),
    }


def _refuse_bad_rows(loaded: LabelledPairs, max_rejected: float) -> None:
    file = loaded.source
    bad, total = loaded.rejected, len(loaded.rejected) + len(loaded.pairs)
    if not total:
        raise ValueError(f"{file}: the file is empty: there is no row")
    if loaded.pairs and len(bad) / total <= max_rejected:
        return
    shown = [f"{row.file}:{row.line}: {row.rule}: {row.detail}" for row in bad[:MISTAKES_SHOWN]]
    if len(bad) > len(shown):
        shown.append(f"and {len(bad) - len(shown)} more")
    fixes = [f"  {rule}: {FIXES[rule]}" for rule in dict.fromkeys(row.rule for row in bad)]
    raise ValueError(
        "\n".join(
            [
                f"{file}: {len(bad)} of {total} rows are bad ({len(bad) / total:.1%}, allowed {max_rejected:.1%})",
                *shown,
                "what to do:",
                *fixes,
                "or leave the bad rows out with a higher --max-rejected",
            ]
        )
    )
