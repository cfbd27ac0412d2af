"""Rows of data: who saw one, and which differ between two data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from rrlhf.data.fingerprints import row_hash, tables_with
from rrlhf.data.tables import SCHEMAS
from rrlhf.located import UsageError
from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.artifacts import Store
from rrlhf.pipeline.stages import spec_of
from rrlhf.tools.lineage.text import line
from rrlhf.types import Json

MEASURES = {"heldout", "evaluate"}  # tables that nothing is trained on
MEASURED = "measured on it, not trained"


class Sighting(NamedTuple):
    """A row in one data set, and the products that it reached: itself, or through what they were made from."""

    row: str
    data: Product
    tables: list[str]
    seen_by: dict[Product, str]  # how


def digest_start(text: str) -> str:
    """Return the start of a row's hash, given as such or as the row itself, as JSON.

    A prompt may be text, or a list of messages. Raises UsageError when it is neither.
    """
    if re.fullmatch("[0-9a-f]{6,64}", text):
        return text
    try:
        row = json.loads(text)
        if isinstance(row["prompt"], str):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"--row {text[:60]!r}: give 6 or more hex digits of a row's hash (`rrlhf diff` prints them), or the row as "
            'JSON: {"prompt": ..., "chosen": ..., "rejected": ...}'
        ) from None
    if "chosen" in row:  # its other columns, such as scores, are no part of a pair
        row = {name: value for name, value in row.items() if name in SCHEMAS["preferences"]}
    return row_hash(row)


def files_by_version(store: Store) -> dict[str, Mapping[str, Path]]:
    """Return the files of every data set that is here, by its digest."""
    return {
        made.digest: {name: made.path / name for name in made.manifest["files"]}
        for made in store.all()
        if made.stage == "prepare"
    }


def sightings(graph: Graph, start: str, files: Mapping[str, Mapping[str, Path]]) -> list[Sighting]:
    """Return where each row whose hash begins with `start` is, and who saw it.

    files: of every data set, by its digest.
    """
    return [
        Sighting(row, data, sorted(tables), _seen(graph, data, tables))
        for data in graph.products
        if data.stage == "prepare" and data.digest in files
        for row, tables in sorted(tables_with(start, files[data.digest]).items())
    ]


def as_text(found: Iterable[Sighting]) -> str:
    """Return sightings for people."""
    lines = []
    for row, data, tables, seen_by in found:
        lines += [f"row {row}", f"in {line(data)}, {', '.join(tables)}"]
        lines += [f"    {line(product)}: {how}" for product, how in seen_by.items()] or ["    made from it: nothing"]
    return "\n".join(lines)


def as_json(found: Iterable[Sighting]) -> Json:
    """Return sightings for scripts."""
    return [
        {
            "row": row,
            "data": data.digest,
            "name": data.title,
            "tables": [*tables],
            "seen_by": [
                {"title": p.title, "node": p.node, "digest": p.digest, "aliases": [*p.aliases], "how": how}
                for p, how in seen_by.items()
            ],
        }
        for row, data, tables, seen_by in found
    ]


def _seen(graph: Graph, data: Product, tables: set[str]) -> dict[Product, str]:
    seen: dict[Product, str] = {}
    for product in graph.down(data)[1:]:
        sources = dict.fromkeys(link.source for link in graph.sources[product])
        looked_into = spec_of(product.stage).tables
        read = tables.intersection(tables if looked_into is None else looked_into) if data in sources else set()
        through = [each.title for each in sources if seen.get(each, MEASURED) != MEASURED]
        if read - MEASURES:
            seen[product] = "read it itself"
        elif through:
            seen[product] = f"through {', '.join(through)}"
        elif read:
            seen[product] = MEASURED
    return seen
