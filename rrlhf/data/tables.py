"""The files of a prepared data set: parquet tables whose columns are fixed here."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rrlhf.types import Demonstration, Json, Preference

Row = dict[str, Any]
Rows = list[Row]

ROWS_AT_ONCE = 10_000  # that are written together

_PROMPT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_SCHEMAS = {
    "sft": {"prompt": _PROMPT, "response": pa.string()},
    "preferences": {
        "prompt": _PROMPT,
        "chosen": pa.string(),
        "rejected": pa.string(),
        "flipped": pa.bool_(),  # whether label noise was put in; null where labels are human
    },
    "ppo": {
        "prompt": _PROMPT,
        "topic": pa.string(),
        "columns": pa.string(),  # as JSON: what else a row of the source had, for reward functions; null: nothing
    },
}
SCHEMAS = {name: pa.schema(fields.items()) for name, fields in _SCHEMAS.items()}
SCHEMAS |= {"heldout": SCHEMAS["preferences"], "evaluate": SCHEMAS["ppo"]}


def write_tables(folder: Path, rows: Iterable[tuple[str, Row]]) -> dict[str, int]:
    """Write the tables of a data set, of rows with the name of their table; return how many each has.

    A table without rows is not written. No more than ROWS_AT_ONCE of a table are held in memory.
    """
    counts, waiting = dict.fromkeys(SCHEMAS, 0), {name: Rows() for name in SCHEMAS}
    with ExitStack() as files:
        writers: dict[str, pq.ParquetWriter] = {}

        def write(name: str) -> None:
            if name not in writers:
                writers[name] = files.enter_context(pq.ParquetWriter(folder / f"{name}.parquet", SCHEMAS[name]))
            writers[name].write_table(pa.Table.from_pylist(waiting[name], schema=SCHEMAS[name]))
            waiting[name].clear()

        for name, row in rows:
            counts[name] += 1
            waiting[name].append(row)
            if len(waiting[name]) == ROWS_AT_ONCE:
                write(name)
        for name in SCHEMAS:
            if waiting[name]:
                write(name)
    return counts


def read_table(folder: Path, name: str) -> Rows:
    """Read one table of a data set as dictionaries."""
    rows: Rows = pq.read_table(folder / f"{name}.parquet").to_pylist()
    return rows


def demonstrations(folder: Path) -> list[Demonstration]:
    """Return what supervised fine-tuning imitates."""
    return [Demonstration(**row) for row in read_table(folder, "sft")]


def preferences(folder: Path, name: str) -> list[Preference]:
    """Return the pairs of table `preferences` or `heldout`."""
    return [Preference(row["prompt"], row["chosen"], row["rejected"]) for row in read_table(folder, name)]


def columns_of(rows: Rows) -> dict[str, list[Json]]:
    """Return what the sources' rows had besides, by column, for rows of table `ppo` or `evaluate`.

    None where a row has not what others have.
    """
    found: list[dict[str, Json]] = [json.loads(row.get("columns") or "{}") for row in rows]
    names = dict.fromkeys(name for row in found for name in row)
    return {name: [row.get(name) for row in found] for name in names}
