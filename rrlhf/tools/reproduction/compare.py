"""Two folders of results: bit-equal, equal within a tolerance, or where they first differ."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from rrlhf.memo import sha256
from rrlhf.pipeline.artifacts import BESIDE, HISTORY

CLOCKS = {"seconds", "tokens_per_second"}  # of the machine, not of the training


class Difference(NamedTuple):
    """The largest difference in one part of a file."""

    file: str
    where: str  # a tensor, or a place in JSON or in a table
    by: float  # absolute; infinity where there is nothing to subtract
    tolerated: bool

    def __str__(self) -> str:
        return f"{self.file}, {self.where}" + (f" by {self.by:.3g}" if self.by < math.inf else "")


def compare(kept: Path, rebuilt: Path, files: Iterable[str], tolerance: float) -> list[Difference]:
    """Compare the files of two folders; history and card, which hold times, are left out.

    Numbers a and b are equal within tolerance t when |a - b| <= t + t |b|. What is not tolerated comes first.
    """
    found: list[Difference] = []
    for name in sorted(set(files) - BESIDE):
        if not (rebuilt / name).is_file():
            found.append(Difference(name, "the file is missing", math.inf, tolerated=False))
        elif sha256(kept / name) != sha256(rebuilt / name):
            found += _in_file(kept / name, rebuilt / name, name, tolerance)
    return sorted(found, key=lambda difference: difference.tolerated)


def verdict(found: Iterable[Difference]) -> str:
    """Say in words what a comparison came to."""
    tolerated = [difference.tolerated for difference in found]
    return "bit-equal" if not tolerated else "equal within tolerance" if all(tolerated) else "differs"


def first_step(kept: Path, rebuilt: Path) -> str | None:
    """Say at which logged step two trainings first part, to the last bit, or None when they never do."""
    rows, again = (_rows(folder / HISTORY) for folder in (kept, rebuilt))
    for row, other in zip(rows, again, strict=False):
        for name in row:
            if name not in CLOCKS and row[name] != other.get(name):
                return f"step {row.get('step', 0):g}: {name} {row[name]!r}, now {other.get(name)!r}"
    return None if len(rows) == len(again) else f"{len(rows)} logged rows, now {len(again)}"


def _rows(history: Path) -> list[dict[str, Any]]:
    lines = history.read_text(encoding="utf-8").splitlines() if history.is_file() else []
    return [json.loads(line) for line in lines]


def _in_file(kept: Path, rebuilt: Path, name: str, tolerance: float) -> list[Difference]:
    """Return the differences of two files with different bytes: at least one."""
    old, new = _parts(kept), _parts(rebuilt)
    if old is None or new is None:
        return [Difference(name, "bytes", math.inf, tolerated=False)]
    apart = {where: _apart(old.get(where), new.get(where), tolerance) for where in old | new}
    found = [Difference(name, where, by, tolerated) for where, (by, tolerated) in apart.items() if by]
    return found or [Difference(name, "layout: the values are equal", 0.0, tolerated=True)]


def _parts(path: Path) -> dict[str, Any] | None:
    """Return what a file holds by its place: tensors, numbers, texts. None for another kind of file."""
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    if path.suffix == ".json":
        return dict(_leaves(json.loads(path.read_bytes())))
    return dict(_leaves(pq.read_table(path).to_pydict())) if path.suffix == ".parquet" else None


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every number and text of a JSON value with its place; a list of numbers is a tensor."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list) and value and all(isinstance(part, float) for part in value):
        yield place, torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, list):
        yield f"{place}, its length", len(value)
        for i, part in enumerate(value):
            yield from _leaves(part, f"{place}[{i}]")
    else:
        yield place or "value", value


def _apart(old: Any, new: Any, tolerance: float) -> tuple[float, bool]:
    """Return the largest difference of two values, and whether it is tolerated."""
    if isinstance(old, float) and type(new) in {int, float}:
        old, new = (torch.tensor(value, dtype=torch.float64) for value in (old, new))
    if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
        return (0.0, True) if old == new and type(old) is type(new) else (math.inf, False)
    if old.shape != new.shape or old.dtype != new.dtype:
        return math.inf, False
    old, new = old.double(), new.double()
    close = torch.allclose(old, new, rtol=tolerance, atol=tolerance, equal_nan=True)
    by = (old - new).abs().masked_fill(old == new, 0).masked_fill(old.isnan() & new.isnan(), 0)
    return float(by.nan_to_num(nan=math.inf, posinf=math.inf).max()) if by.numel() else 0.0, close
