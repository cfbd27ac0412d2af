"""What differs between two products (settings, code, rows of data, numbers, and where it begins), and who saw a row."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from rrlhf.data.fingerprints import RowChanges, beginnings, row_changes, row_hash, tables_with
from rrlhf.data.tables import SCHEMAS
from rrlhf.located import UsageError
from rrlhf.pipeline.ancestry import Graph, Product
from rrlhf.pipeline.graph import EXTERNAL
from rrlhf.pipeline.keys import UNSET, Change, changes, in_words
from rrlhf.pipeline.stages import spec_of
from rrlhf.pipeline.store import Store
from rrlhf.tools.lineage.text import line
from rrlhf.types import Json

ROWS_SHOWN = 5  # of each kind and table
DIGITS = 12  # of a row's hash
MEASURES = {"heldout", "evaluate"}  # tables that nothing is trained on
MEASURED = "measured on it, not trained"


class NodeDiff(NamedTuple):
    """One node of both ancestries."""

    name: str
    old: Product | None
    new: Product | None
    changes: list[Change]  # that begin here: an input that changed was changed further up
    reasons: list[str]  # why results differ, as far as that begins here

    @property
    def same(self) -> bool:
        """Whether both sides have this node with the same result of the same key document."""
        return bool(self.old and self.new and self.old.digest == self.new.digest and not self.reasons)


class Diff(NamedTuple):
    """Everything that differs between two products."""

    old: Product
    new: Product
    nodes: list[NodeDiff]  # upstream first
    metrics: dict[str, tuple[float | None, float | None]]  # the last value of every number that one of them logged
    rows: dict[str, RowChanges]  # by table
    texts: dict[str, str]  # how the rows that are shown begin, by hash
    unknown: str  # which rows could not be compared, and why

    @property
    def first(self) -> NodeDiff | None:
        """The node where the difference begins."""
        return next((node for node in self.nodes if node.reasons), None)


def compared(graph: Graph, old: Product, new: Product, store: Store) -> Diff:
    """Compare two products with everything that they were made from."""
    names = [name for name in {**old.metrics, **new.metrics} if name not in {"step", "seconds"}]
    numbers = {name: (old.metrics.get(name), new.metrics.get(name)) for name in names}
    return Diff(old, new, nodes(graph, old, new), numbers, *_rows(graph, old, new, store))


def nodes(graph: Graph, old: Product, new: Product) -> list[NodeDiff]:
    """Compare two ancestries node by node, upstream first; the two products themselves are compared with each other."""
    before, after = ({each.node: each for each in graph.up(product) if each.stage} for product in (old, new))
    if old.node != new.node:
        after[old.node] = after.pop(new.node)
    above = {
        name: max(len(graph.up(side[name])) for side in (before, after) if name in side) for name in before | after
    }
    order = sorted(above, key=lambda name: (above[name], name))
    return [_node(name, before.get(name), after.get(name)) for name in order]


def as_text(diff: Diff) -> str:
    """Return a diff for people."""
    lines = [f"A  {line(diff.old)}", f"B  {line(diff.new)}"]
    if diff.old.commit != diff.new.commit:
        lines.append(f"git commit {diff.old.commit or 'unknown'} -> {diff.new.commit or 'unknown'}")
    if diff.first is None and diff.old.digest == diff.new.digest:
        return "\n".join([*lines, "the same content, made in the same way"])
    if diff.first:
        lines.append(f"first difference: {diff.first.name} ({diff.first.reasons[0]})")
    lines.append("")
    for node in diff.nodes:
        first, *others = node.reasons or ["same" if node.same else "an input changed"]
        lines += [f"{node.name:12} {first}", *(f"{'':12} {reason}" for reason in others)]
    lines += ["", diff.unknown] if diff.unknown else []
    lines += ["", "rows of data"] if diff.rows else []
    for table, found in diff.rows.items():
        lines += _rows_told(table, found, diff.texts)
    lines += ["", "metrics" + " " * 28 + "A           B"]
    for name, values in diff.metrics.items():
        if values[0] != values[1]:
            old, new = ("-" if value is None else f"{value:.5g}" for value in values)
            lines.append(f"{name:34} {old:11} {new}")
    return "\n".join(lines)


def as_json(diff: Diff) -> dict[str, object]:
    """Return a diff for scripts."""
    return {
        "old": diff.old.digest,
        "new": diff.new.digest,
        "first_difference": diff.first.name if diff.first else None,
        "nodes": [
            {
                "node": node.name,
                "old": node.old.digest if node.old else None,
                "new": node.new.digest if node.new else None,
                "same": node.same,
                "changes": [
                    {"name": ".".join(path), "old": None if old is UNSET else old, "new": None if new is UNSET else new}
                    for path, old, new in node.changes
                ],
                "reasons": node.reasons,
            }
            for node in diff.nodes
        ],
        "rows": {
            table: {**found._asdict(), "changed": [pair._asdict() for pair in found.changed]}
            for table, found in diff.rows.items()
        },
        "metrics": diff.metrics,
        "unknown": diff.unknown,
    }


def _node(name: str, old: Product | None, new: Product | None) -> NodeDiff:
    if old is None or new is None:
        return NodeDiff(name, old, new, [], [f"only in {'B' if old is None else 'A'}"])
    if old.document is None or new.document is None:
        explained = old.digest == new.digest or old.inputs != new.inputs
        return NodeDiff(name, old, new, [], [] if explained else ["unknown: its settings were not kept"])
    found = changes(old.document, new.document)
    own = [change for change in found if change.path[0] != "inputs" or change.path[1] in EXTERNAL]
    if old.stage != new.stage:
        reasons = [f"another stage: {old.stage} -> {new.stage}"]
    elif not found and old.digest != new.digest:
        reasons = ["the same settings, code and inputs, and another result"]
    else:
        reasons = in_words(own)
    return NodeDiff(name, old, new, own, reasons)


def _rows(graph: Graph, old: Product, new: Product, store: Store) -> tuple[dict[str, RowChanges], dict[str, str], str]:
    """Compare the data sets above two products; return also how shown rows begin, and what cannot be compared."""
    before, after = ({each.digest: each for each in graph.up(end) if each.stage == "prepare"} for end in (old, new))
    if before.keys() == after.keys():
        return {}, {}, ""
    if len(before) != 1 or len(after) != 1:
        return {}, {}, f"rows: A has {len(before)} data sets above it, B {len(after)}"
    files = files_by_version(store)
    if missing := [line(data) for digest, data in {**before, **after}.items() if digest not in files]:
        return {}, {}, f"rows of {' and '.join(missing)}: their files are not here"
    one, other = files[next(iter(before))], files[next(iter(after))]
    found = row_changes(one, other)
    shown = {
        table: {*each.added[:ROWS_SHOWN], *each.removed[:ROWS_SHOWN], *(pair.new for pair in each.changed[:ROWS_SHOWN])}
        for table, each in found.items()
    }
    return found, beginnings(one, shown) | beginnings(other, shown), ""


def _rows_told(table: str, found: RowChanges, texts: Mapping[str, str]) -> list[str]:
    """List the rows that differ, a few of each kind, with the start of what they say."""
    added, removed, changed = (len(part) for part in found[:3])
    pairs = found.changed[:ROWS_SHOWN]
    shown = [f"  + {row[:DIGITS]} {texts.get(row, '')}" for row in found.added[:ROWS_SHOWN]]
    shown += [f"  - {row[:DIGITS]} {texts.get(row, '')}" for row in found.removed[:ROWS_SHOWN]]
    shown += [f"  ~ {p.old[:DIGITS]} -> {p.new[:DIGITS]} {texts.get(p.new, '')} ({p.what})" for p in pairs]
    more = added + removed + changed - len(shown)
    shown += [f"  and {more} more; --json lists all"] if more else []
    return [f"{table:12} {added} added, {removed} removed, {changed} changed, {found.kept} kept", *shown]


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


def sightings_as_text(found: Iterable[Sighting]) -> str:
    """Return sightings for people."""
    lines = []
    for row, data, tables, seen_by in found:
        lines += [f"row {row}", f"in {line(data)}, {', '.join(tables)}"]
        lines += [f"    {line(product)}: {how}" for product, how in seen_by.items()] or ["    made from it: nothing"]
    return "\n".join(lines)


def sightings_as_json(found: Iterable[Sighting]) -> Json:
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
