"""Two folders of results: bit-equal, equal within a tolerance, or where they first differ."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from rrlhf.memo import sha256
from rrlhf.pipeline.artifacts import BESIDE, HISTORY

CLOCKS = {"seconds", "tokens_per_second"}  # of the machine, not of the training

Verdict = Literal["bit-equal", "equal within tolerance", "differs"]


class Difference(NamedTuple):
    """The largest difference in one part of a file."""

    file: str
    where: str  # a tensor, a place in JSON, a column and row
    by: float  # absolute; infinity where there is nothing to subtract
    tolerated: bool


class Comparison(NamedTuple):
    """What the comparison of two folders came to."""

    verdict: Verdict
    differences: list[Difference]  # the first one to look at first: those that are not tolerated lead
    files: int


def compare(kept: Path, rebuilt: Path, files: Iterable[str], tolerance: float) -> Comparison:
    """Compare the files of two folders; history and card, which hold times, are left out.

    Numbers a and b are equal within tolerance t when |a - b| <= t + t |b|.
    """
    names = sorted(set(files) - BESIDE)
    found: list[Difference] = []
    for name in names:
        if not (rebuilt / name).is_file():
            found.append(Difference(name, "the file is missing", math.inf, tolerated=False))
        elif sha256(kept / name) != sha256(rebuilt / name):
            found += _in_file(kept / name, rebuilt / name, name, tolerance)
    found.sort(key=lambda difference: difference.tolerated)
    if not found:
        return Comparison("bit-equal", [], len(names))
    equal = all(difference.tolerated for difference in found)
    return Comparison("equal within tolerance" if equal else "differs", found, len(names))


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
    readers = {".safetensors": _tensors, ".json": _json, ".parquet": _parquet}
    read = readers.get(kept.suffix)
    if read is None:
        return [Difference(name, "bytes", math.inf, tolerated=False)]
    old, new = read(kept), read(rebuilt)
    found = []
    for where in old | new:
        by, tolerated = _apart(old.get(where), new.get(where), tolerance)
        if by:
            found.append(Difference(name, where, by, tolerated))
    return found or [Difference(name, "layout: the values are equal", 0.0, tolerated=True)]


def _apart(old: Any, new: Any, tolerance: float) -> tuple[float, bool]:
    """Return the largest difference of two values, and whether it is tolerated."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        if old.shape != new.shape or old.dtype != new.dtype:
            return math.inf, False
        apart = (old.double() - new.double()).abs()
        same = (apart <= tolerance + tolerance * new.double().abs()) | (old == new) | (old.isnan() & new.isnan())
        largest = float(apart.nan_to_num(math.inf).max()) if apart.numel() else 0.0
        return (0.0 if torch.equal(old, new) else largest), bool(same.all())
    if isinstance(old, float) and isinstance(new, float | int) and not isinstance(new, bool):
        close = abs(old - new) <= tolerance + tolerance * abs(new) or old == new or (old != old and new != new)
        return (0.0 if old == new else abs(old - new)), close
    return (0.0, True) if old == new and type(old) is type(new) else (math.inf, False)


def _tensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no dictionary)


def _json(path: Path) -> dict[str, Any]:
    return dict(_leaves(json.loads(path.read_bytes()), ""))


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield every number and text of a JSON value with its place; an integer is a number like any other."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        yield f"{place}, its length", len(value)
        for i, part in enumerate(value):
            yield from _leaves(part, f"{place}[{i}]")
    else:
        yield place or "value", value


def _parquet(path: Path) -> dict[str, Any]:
    """Return numbers by column as one tensor each, and all else by column and row."""
    table = pq.read_table(path)
    found: dict[str, Any] = {"rows": table.num_rows}
    for name in table.column_names:
        values = table.column(name).to_pylist()
        if values and all(isinstance(value, float) for value in values):
            found[f"column {name}"] = torch.tensor(values, dtype=torch.float64)
        else:
            found |= {f"column {name}, {place}": value for place, value in _leaves(values, "row ")}
    return found
