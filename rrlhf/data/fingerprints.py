"""Rows of a data set by their content: which rows it has, whether two data sets have the same, what differs.

A row's hash is the sha256 of its canonical JSON: fields by name, message lists included, what has no value left out.
Two things are not part of it: the order of rows, and `flipped`, which says how a label came about and not what it is.
Texts count as they are, without Unicode normalisation: other code points are other tokens to a model. Two prompts are
"the same prompt" by the looser rule that also splits the data (`rrlhf.data.load.prompt_hash`).
"""

import hashlib
import json
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rrlhf.data.load import prompt_hash
from rrlhf.data.tables import SCHEMAS, Rows

FILE = "rows.parquet"  # of a prepared data set: the hash of every row
LEFT_OUT = {"flipped"}
LETTERS = 50  # of a prompt, for people

_Row = tuple[str, dict[str, Any]]  # with its hash
_Side = tuple[Mapping[str, Path], Counter[str]]  # files of a data set by name, and how often it has a row
_SCHEMA = pa.schema([("row", pa.binary(32)), ("table", pa.string())])
_ROWS_PER_GROUP = 1024


class Changed(NamedTuple):
    """A row of each of two data sets with the same prompt and other responses: their hashes, and what is other."""

    old: str
    new: str
    what: str


class RowChanges(NamedTuple):
    """What differs between one table of two data sets: hashes of rows, as often as they are there."""

    added: list[str]
    removed: list[str]
    changed: list[Changed]
    kept: int


def row_hash(row: Mapping[str, Any]) -> str:
    """Return the sha256 of a row, in hex.

    >>> row_hash({"chosen": "Yes.", "prompt": [{"role": "user", "content": "Ice?"}], "rejected": "No."})[:8]
    '5bdda7cb'
    """
    known = {name: value for name, value in row.items() if value is not None and name not in LEFT_OUT}
    text = json.dumps(known, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(hashes: Iterable[str]) -> str:
    """Return the sha256 over the sorted hashes of rows: the same in any order, another for any other set of rows.

    Sorting costs little and keeps what makes sha256 safe. Adding hashes up is order-free too, but sums can be forged
    (Wagner 2002, the generalised birthday problem); combining them by xor does not see a pair of equal rows.
    """
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def write_hashes(folder: Path, tables: Mapping[str, Iterable[str]]) -> None:
    """Write the hash of every row of a data set, in hex by table, beside its tables."""
    lines = sorted((bytes.fromhex(row), name) for name, some in tables.items() for row in some)
    columns = [[row for row, _ in lines], [name for _, name in lines]]
    pq.write_table(pa.table(columns, schema=_SCHEMA), folder / FILE, row_group_size=_ROWS_PER_GROUP)


def hashes(files: Mapping[str, Path]) -> dict[str, list[str]]:
    """Return the hashes of the rows of every table, given the files of a data set by name.

    A data set from before rows had hashes is read as a whole.
    """
    if FILE not in files:
        return {name: [row_hash(row) for row in _read(files, name)] for name in SCHEMAS if f"{name}.parquet" in files}
    table = pq.read_table(files[FILE], columns=["row", "table"])
    found: dict[str, list[str]] = {}
    for row, name in zip(table["row"].to_pylist(), table["table"].to_pylist(), strict=True):
        found.setdefault(name, []).append(row.hex())
    return found


def tables_with(start: str, files: Mapping[str, Path]) -> dict[str, set[str]]:
    """Return the tables that hold each row whose hash begins with `start` (hex), given the files of a data set."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, rows in hashes(files).items():
        for row in rows:
            if row.startswith(start):
                found[row].add(name)
    return found


def row_changes(old: Mapping[str, Path], new: Mapping[str, Path]) -> dict[str, RowChanges]:
    """Compare two data sets, given their files by name; tables without a difference are there with what they keep."""
    before, after = hashes(old), hashes(new)
    return {
        name: _table_changes(name, (old, Counter(before.get(name, ()))), (new, Counter(after.get(name, ()))))
        for name in SCHEMAS
        if name in before or name in after
    }


def beginnings(files: Mapping[str, Path], wanted: Mapping[str, set[str]]) -> dict[str, str]:
    """Return how the prompts of rows begin, on one line and with everything unusual escaped, by the rows' hashes.

    wanted: hashes by table.
    """
    return {
        digest: json.dumps(row["prompt"][-1]["content"][:LETTERS])
        for name, some in wanted.items()
        if some and f"{name}.parquet" in files
        for row in _read(files, name)
        if (digest := row_hash(row)) in some
    }


def _table_changes(name: str, old: _Side, new: _Side) -> RowChanges:
    removed, added = old[1] - new[1], new[1] - old[1]
    kept = (old[1] & new[1]).total()
    if not (removed and added):
        return RowChanges(sorted(added.elements()), sorted(removed.elements()), [], kept)
    changed = list(_pairs(_rows(old[0], name, removed), _rows(new[0], name, added)))
    removed.subtract(pair.old for pair in changed)
    added.subtract(pair.new for pair in changed)
    return RowChanges(sorted(added.elements()), sorted(removed.elements()), changed, kept)


def _rows(files: Mapping[str, Path], name: str, wanted: Counter[str]) -> list[_Row]:
    """Return the wanted rows of a table with their hashes, as often as they are wanted."""
    left, found = wanted.copy(), []
    for row in _read(files, name):
        digest = row_hash(row)
        if left[digest] > 0:
            left[digest] -= 1
            found.append((digest, row))
    return found


def _pairs(old: list[_Row], new: list[_Row]) -> Iterator[Changed]:
    """Pair removed with added rows of the same prompt: with the label turned, else with a field in common, else any."""
    fields = [name for name in old[0][1] if name not in {"prompt", *LEFT_OUT}]
    turned = [(("rejected", "chosen"), ("chosen", "rejected"))] if "chosen" in fields else []
    for before, after in [*turned, *(((name,), (name,)) for name in fields), ((), ())]:
        left: list[_Row] = []
        free: dict[tuple[str, ...], deque[_Row]] = defaultdict(deque)
        for row in new:
            free[_mark(row, after)].append(row)
        for row in old:
            if found := free[_mark(row, before)]:
                digest, other = found.popleft()
                yield Changed(row[0], digest, _what(row[1], other))
            else:
                left.append(row)
        old, new = left, [row for rows in free.values() for row in rows]


def _mark(row: _Row, fields: Iterable[str]) -> tuple[str, ...]:
    """Return the prompt and some fields of a row as what two rows may have in common."""
    return (prompt_hash(row[1]["prompt"]), *(str(row[1].get(name)) for name in fields))


def _what(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Say what differs between two rows."""
    if "chosen" in one and (one["chosen"], one["rejected"]) == (other["rejected"], other["chosen"]):
        return "label turned"
    return ", ".join(name for name in one if name not in LEFT_OUT and one[name] != other.get(name))


def _read(files: Mapping[str, Path], name: str) -> Rows:
    rows: Rows = pq.read_table(files[f"{name}.parquet"]).to_pylist()
    return rows
